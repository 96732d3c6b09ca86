"""A merge that is ended from outside leaves nothing, or what the next merge removes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kilodelta.export.merge.checkpoint import merge
from kilodelta.format.methods import Lora
from tests.support.making import delta, model, write

SLOW = """
import pathlib, sys, time
from kilodelta.cli import main
from kilodelta.export.merge import streaming
at_once = streaming.pwrite
def pwrite(*arguments):
    pathlib.Path(sys.argv[-1], "begun").touch()
    time.sleep(0.5)
    at_once(*arguments)
streaming.pwrite = pwrite
main(sys.argv[1:-1])
"""


@pytest.fixture
def work(tmp_path: Path) -> Path:
    base = write(tmp_path / "base.safetensors", model())
    delta(base, Lora(rank=1)).save(tmp_path / "x.kd")
    return tmp_path


def merging(work: Path) -> subprocess.Popen[str]:
    """The command, while it writes its result."""
    base, file, out = (str(work / n) for n in ("base.safetensors", "x.kd", "out.safetensors"))
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "merge", "-q", base, file, "-o", out, str(work)],
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (work / "begun").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    (work / "begun").unlink()
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_merge_that_is_asked_to_end_removes_what_it_had_begun(
    work: Path, number: signal.Signals, ctrl_c: None
) -> None:
    process = merging(work)
    process.send_signal(number)
    _, text = process.communicate()
    assert process.returncode == 128 + number, text
    assert "interrupted" in text
    assert (
        {"base.safetensors", "x.kd"} <= {*os.listdir(work)} <= {"base.safetensors", "x.kd", "begun"}
    )


def test_what_a_killed_merge_leaves_goes_with_the_next(work: Path) -> None:
    process = merging(work)
    process.kill()
    process.communicate()
    assert len([name for name in os.listdir(work) if name.startswith(".kilodelta.")]) == 1
    merge(work / "base.safetensors", work / "x.kd", work / "out.safetensors")
    left = {*os.listdir(work)} - {"begun"}
    assert left == {"base.safetensors", "x.kd", "out.safetensors"}
