"""`python -m kilodelta.verify.gpu`: what it says without a GPU, and its parts tried on a CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kilodelta.kernels import stream
from kilodelta.verify import gpu, gpu_exact, gpu_speed
from kilodelta.verify.gpu_part import Part, Row, Setting, run
from kilodelta.verify.result import FAILED, NOT_RUN, PASSED


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_gpu_every_part_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["-o", str(tmp_path / "report")]) == gpu.SKIPPED == 77
    found = json.loads((tmp_path / "report" / "gpu.json").read_text())
    assert [part["name"] for part in found["parts"]] == ["exactness", "parity", "speed"]
    for part in found["parts"]:
        assert part["status"] == "not run"
        assert [row["found"] for row in part["rows"]] == ["not run: no CUDA device"]
    assert {"devices", "date", "versions"} <= found["machine"].keys()
    text = (tmp_path / "report" / "gpu.txt").read_text()
    assert capsys.readouterr().out == text
    assert text.count("not run: no CUDA device") == 3


def test_a_report_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old").write_text("x")
    assert gpu.main(["-o", str(tmp_path)]) == 8
    assert "exists already\n  fix: give a new folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        ((PASSED, NOT_RUN), 0),
        ((PASSED, FAILED), 6),
        ((NOT_RUN, NOT_RUN), 77),
        ((PASSED, PASSED), 0),
    ],
)
def test_exit_codes(statuses: tuple[str, ...], code: int) -> None:
    parts = tuple(
        Part(name="x", rows=(Row(what="x", found="y", status=status),)) for status in statuses
    )
    assert gpu.Proof(machine={}, parts=parts).exit_code == code


def test_what_came_before_an_error_is_kept(tmp_path: Path) -> None:
    def work(setting: Setting) -> Iterator[Row]:
        yield Row(what="first", found="good")
        raise RuntimeError("out of memory")

    part = run("x", work, Setting(device="cpu", folder=tmp_path))
    assert [row.found for row in part.rows] == ["good", "RuntimeError: out of memory"]
    assert part.status == FAILED


def test_exactness_on_a_cpu(tmp_path: Path) -> None:
    part = run("exactness", gpu_exact.exact, Setting(device="cpu", folder=tmp_path, small=True))
    assert part.status == PASSED, part
    assert len(part.rows) == 18
    assert {row.found for row in part.rows[:16]} == {"12 tensors equal"}


def test_one_wrong_bit_is_a_failed_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = stream.merged

    def wrong(delta: Any, target: Any, *others: Any) -> Iterator[Any]:
        for part in real(delta, target, *others):
            yield part ^ np.uint8(target.name == "wide.BF16.weight")

    monkeypatch.setattr(stream, "merged", wrong)
    rows = gpu_exact.exact(Setting(device="cpu", folder=tmp_path, small=True))
    first = next(rows)
    assert (first.status, first.found) == (FAILED, "differs in wide.BF16.weight")


def test_speed_on_a_cpu_names_ratios(tmp_path: Path) -> None:
    part = run("speed", gpu_speed.speed, Setting(device="cpu", folder=tmp_path, small=True))
    assert part.status == PASSED, part
    assert "x reading and writing" in part.rows[1].found
    assert "int8 TOPS" in part.rows[2].found
