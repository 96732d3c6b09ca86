"""The search for a learning rate by short trainings: its order, its time, its resumption."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kilodelta.compress import Options, compress
from kilodelta.compress.distill.learn import tune
from kilodelta.compress.distill.learn.objective import Measures
from kilodelta.compress.distill.learn.schedule import Distilled, Schedule
from kilodelta.compress.distill.learn.tune import Trial, next_rate
from kilodelta.compress.distill.options import check
from kilodelta.errors import InputError, OutputError
from kilodelta.format.file import load
from kilodelta.format.methods import UniLora
from kilodelta.progress import Event
from tests.support import many_outputs
from tests.support.distilling import coefficients, equal, silent, task
from tests.support.many_outputs import Spec

SCHEDULE = Schedule(steps=800, rate=0.01, batch=4, bits=8, seed=5)
FACTS = {"inputs": "a"}


def tried(divergences: Mapping[float, float]) -> list[Trial]:
    return [Trial(rate=r, divergence=d, seconds=1.0) for r, d in divergences.items()]


@pytest.mark.parametrize(
    ("by_rate", "then"),
    [
        ({}, 1.0),
        ({1.0: 0.3}, 0.5),
        ({1.0: 0.3, 0.5: 0.4}, 2.0),
        ({1.0: 0.3, 0.5: 0.4, 2.0: 0.5}, None),
        ({1.0: 0.3, 0.5: 0.4, 2.0: 0.2}, 4.0),
        ({1.0: 0.3, 0.5: 0.4, 2.0: 0.2, 4.0: 0.25}, None),
        ({1.0: 0.3, 0.5: 0.2, 2.0: 0.4, 0.25: 0.1}, 0.125),
        ({1.0: 0.3, 0.5: 0.3, 2.0: 0.3}, None),  # of equals the method's own
        ({2.0**n: 1.0 / (n + 9) for n in range(-1, 7)}, None),  # no farther
    ],
)
def test_rates_are_tried_in_a_fixed_order(by_rate: dict[float, float], then: float | None) -> None:
    assert next_rate(tried(by_rate)) == then


class Script:
    """A double of `distill`: a trial's divergence follows from its rate."""

    def __init__(self, nearest: float, interrupt_at: int = 0) -> None:
        self.nearest, self.interrupt_at = nearest, interrupt_at
        self.rates: list[float] = []
        self.steps: list[int] = []

    def __call__(
        self, student: Any, data: Any, schedule: Schedule, *_: Any, **__: Any
    ) -> Distilled:
        self.rates.append(schedule.rate / SCHEDULE.rate)
        self.steps.append(schedule.steps)
        with torch.no_grad():  # a training leaves other coefficients behind
            next(p for p in student.module.parameters() if p.requires_grad).add_(1)
        distance = abs(np.log2(self.rates[-1] / self.nearest))
        return Distilled(
            measures=(Measures(agreement=0, divergence=distance),), curve=(), steps=schedule.steps,
            seconds=0, interrupted=len(self.rates) == self.interrupt_at,
        )  # fmt: skip


def search(kept: Path, minutes: float = 60, resume: bool = False, **facts: str) -> tune.Tuned:
    student, data = task()
    before = coefficients(student)
    found = tune.tune(
        student, data, SCHEDULE, minutes, silent, kept=kept, facts={**FACTS, **facts}, resume=resume
    )
    assert equal(coefficients(student), before)
    return found


def test_the_search_ends_at_the_best_rate_and_leaves_the_student_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(nearest=0.25)
    monkeypatch.setattr(tune, "distill", script)
    assert search(tmp_path / "a.trials") == tune.Tuned(rate=0.0025, trials=5)
    assert script.rates == [1.0, 0.5, 2.0, 0.25, 0.125]
    assert script.steps == [200] * 5


def test_no_trial_begins_that_would_end_too_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, clock = Script(nearest=0.25), iter(range(0, 10_000, 30))  # 30 s a trial
    monkeypatch.setattr(tune, "distill", script)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    assert search(tmp_path / "a", minutes=1.4).trials == 2
    assert search(tmp_path / "b", minutes=0.1).trials == 1  # one is always taken


def test_an_interrupted_search_goes_on_where_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, script = tmp_path / "a.trials", Script(nearest=0.25, interrupt_at=3)
    monkeypatch.setattr(tune, "distill", script)
    with pytest.raises(KeyboardInterrupt):
        search(kept)
    script.interrupt_at = 0
    assert search(kept, resume=True) == tune.Tuned(rate=0.0025, trials=5)
    assert script.rates == [1.0, 0.5, 2.0, 2.0, 0.25, 0.125]
    # A search that has ended is not gone on with, however much time there is.
    assert search(kept, minutes=900, resume=True).trials == 5
    assert len(script.rates) == 6
    with pytest.raises(InputError, match="belongs to a run with other inputs"):
        search(kept, resume=True, inputs="b")
    whole = json.loads(kept.read_text())
    for content in ("", "{}", "[1]", json.dumps({**whole, "trials": [{"rate": "x"}]}),
                    json.dumps({**whole, "trials": []})):  # fmt: skip
        kept.write_text(content)
        with pytest.raises(InputError, match="is damaged"):
            search(kept, resume=True)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with base, tuned model and inputs."""
    monkeypatch.chdir(tmp_path)
    many_outputs.SPEC = Spec(inputs="tokens", mask=False, outputs=("logits",))
    return many_outputs.save_pair(tmp_path)


OPTIONS = Options(
    model="tests.support.many_outputs:make", method=UniLora(rank=2, bases=64), steps=6, batch=8
)


def make(name: str, options: Options, **more: Any) -> Any:
    models = "base.safetensors", "tuned.safetensors"
    return compress(*models, name, inputs="ids.npz", options=options, **more)


@pytest.mark.usefixtures("here", "ctrl_c")
def test_the_file_says_what_was_chosen_and_the_rate_alone_makes_it_again() -> None:
    make("tuned.kd", replace(OPTIONS, tune=60.0))
    one = load(Path("tuned.kd"))
    made = one.manifest.made
    assert int(made["trials"]) >= 3
    make("again.kd", replace(OPTIONS, rate=float(made["rate"])))
    other = load(Path("again.kd"))
    assert bytes(one.blob) == bytes(other.blob)
    assert one.manifest.result == other.manifest.result
    assert not Path("tuned.kd.trials").exists()
    assert "trials" not in other.manifest.made

    # Stopped in the second trial, and then in the training itself.
    events = iter(range(1, 1000))

    def stop(event: Event) -> None:
        if event.stage.startswith("distil") and next(events) == 8:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        make("cut.kd", replace(OPTIONS, tune=60.0), progress=stop)
    assert not Path("cut.kd").exists()
    with pytest.raises(OutputError, match=r"cut\.kd\.trials holds an interrupted run"):
        make("cut.kd", replace(OPTIONS, tune=60.0))

    def stop_last(event: Event) -> None:
        if (event.stage, event.done) == ("distil", 3):
            signal.raise_signal(signal.SIGINT)

    cut = make("cut.kd", replace(OPTIONS, tune=60.0), resume=True, progress=stop_last)
    assert cut.interrupted
    make("cut.kd", replace(OPTIONS, tune=60.0), resume=True)
    assert Path("cut.kd").read_bytes() == Path("tuned.kd").read_bytes()


@pytest.mark.usefixtures("here")
def test_one_trial_is_said_to_compare_nothing() -> None:
    report = make("a.kd", replace(OPTIONS, tune=1e-9))
    assert any("--tune had time for one trial" in warning for warning in report.warnings)


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan"), float("inf")])
def test_minutes_that_are_none_are_refused(minutes: float) -> None:
    with pytest.raises(InputError, match="tune is"):
        check(Options(tune=minutes), learns=True)
    with pytest.raises(InputError, match="--lr gives one"):
        check(Options(tune=1.0, rate=0.1), learns=True)
    with pytest.raises(InputError, match="a rate cannot be searched for without inputs"):
        check(Options(tune=1.0, method="lora"), learns=False)
