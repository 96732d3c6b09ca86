"""Memory that runs out outside a training step: rows are computed in halves, or a sentence said."""

from __future__ import annotations

import resource
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from click.testing import CliRunner
from torch import Tensor

from kilodelta import memory
from kilodelta.cli import main
from kilodelta.compress.distill.learn.data import Data
from kilodelta.compress.distill.learn.gradient.pieces import by_halves
from kilodelta.compress.distill.learn.measure import measure
from kilodelta.compress.distill.teacher.ask import ask
from kilodelta.errors import InputError
from kilodelta.models.loaded import LoadedModel
from kilodelta.progress import silent
from tests.support.distilling import Encoder, task

SAID = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 119808000 bytes."


class Short(Encoder):
    """The encoder on a machine that holds three rows at a time."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if len(x) > 3:
            raise RuntimeError(SAID)
        return super().forward(x)


def short(seed: int) -> LoadedModel:
    return LoadedModel(source="encoder", module=Short(seed).eval(), kind="any", names={})


def test_the_tuned_model_is_asked_and_the_student_measured_in_halves() -> None:
    _, data = task()
    teacher, _ = ask(short(2), data.rows, data.survey, silent)
    for index in range(len(data.rows)):
        for name, values in data.teacher([index]).items():
            assert torch.allclose(teacher([index])[name], values, atol=1e-6)
    whole = LoadedModel(source="encoder", module=Encoder(1).eval(), kind="any", names={})
    halved: Data = replace(data, teacher=teacher)
    for found, wanted in zip(
        measure(short(1), halved, data.held_out), measure(whole, data, data.held_out), strict=True
    ):
        assert found.agreement == pytest.approx(wanted.agreement, abs=1e-6)
        assert found.divergence == pytest.approx(wanted.divergence, abs=1e-6)


def test_a_single_input_that_does_not_fit_is_said() -> None:
    def never(rows: Any) -> None:
        raise RuntimeError(SAID)

    with pytest.raises(InputError, match="memory ran out on a single input"):
        by_halves([1, 2, 3], never)
    with pytest.raises(InputError, match="memory ran out on a batch"):
        by_halves([1, 2, 3], never, in_step=True)

    def other(rows: Any) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        by_halves([1, 2, 3], other)


@pytest.mark.parametrize("error", [MemoryError("Unable to allocate 9 GiB"), RuntimeError(SAID)])
def test_any_command_says_that_memory_ran_out(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def runs_out(*given: Any, **more: Any) -> None:
        raise error

    monkeypatch.setattr("kilodelta.files.model_digest.digest", runs_out)
    answer = CliRunner().invoke(main, ["digest", "tests/golden/0.1.0/base.safetensors"])
    assert answer.exit_code == InputError.exit_code, answer.exception
    assert f"memory ran out: {error}" in answer.stderr.replace("\n", " ")


def test_what_ulimit_leaves_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = int(memory._STATM.read_text().split()[0]) * resource.getpagesize()
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (taken + (100 << 20), -1))
    left = memory.stated()
    assert left is not None
    assert 0 < left <= (110 << 20)
