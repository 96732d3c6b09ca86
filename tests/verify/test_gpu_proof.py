"""`python -m kilodelta.verify.gpu`: what it says without a GPU, and its parts tried on a CPU."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import pytest
import torch

from kilodelta.errors import MissingPackageError
from kilodelta.merging.gpu import stream
from kilodelta.verify.gpu import exact, machine, measure, speed
from kilodelta.verify.gpu.measure import Measure, Threshold
from kilodelta.verify.gpu.part import MEASURED, Part, PartRow, Setting, guarded, run
from kilodelta.verify.parity.result import FAILED, NOT_RUN, PASSED


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_gpu_every_part_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert machine.main(["-o", str(tmp_path / "report")]) == machine.SKIPPED == 77
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
    assert machine.main(["-o", str(tmp_path)]) == 8
    assert "exists already\n  fix: give a new" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_some_parts_alone(tmp_path: Path) -> None:
    assert machine.main(["-o", str(tmp_path / "report"), "--only", "speed"]) == 77
    found = json.loads((tmp_path / "report" / "gpu.json").read_text())
    assert [part["name"] for part in found["parts"]] == ["speed"]


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        ((PASSED, NOT_RUN), 0),
        ((PASSED, FAILED), 6),
        ((NOT_RUN, NOT_RUN), 77),
        ((PASSED, PASSED), 0),
        ((MEASURED, NOT_RUN), 0),
        ((MEASURED, FAILED), 6),
    ],
)
def test_exit_codes(statuses: tuple[str, ...], code: int) -> None:
    parts = tuple(
        Part(name="x", rows=(PartRow(what="x", found="y", status=status),)) for status in statuses
    )
    assert machine.MachineProof(machine={}, parts=parts).exit_code == code


def test_what_came_before_an_error_is_kept(tmp_path: Path) -> None:
    def work(setting: Setting) -> Iterator[PartRow]:
        yield PartRow(what="first", found="good")
        raise RuntimeError("out of memory")

    part = run("x", work, Setting(device="cpu", folder=tmp_path))
    assert [row.found for row in part.rows] == ["good", "RuntimeError: out of memory"]
    assert part.status == FAILED


def test_exactness_on_a_cpu(tmp_path: Path) -> None:
    part = run("exactness", exact.exact, Setting(device="cpu", folder=tmp_path, small=True))
    assert part.status == PASSED, part
    assert len(part.rows) == 18
    assert {row.found for row in part.rows[:16]} == {"12 tensors equal"}


def test_one_wrong_bit_is_a_failed_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = stream.merged

    def wrong(delta: Any, target: Any, *others: Any) -> Iterator[Any]:
        for part in real(delta, target, *others):
            yield part ^ np.uint8(target.name == "wide.BF16.weight")

    monkeypatch.setattr(stream, "merged", wrong)
    rows = exact.exact(Setting(device="cpu", folder=tmp_path, small=True))
    first = next(rows)
    assert (first.status, first.found) == (FAILED, "differs in wide.BF16.weight")


@pytest.mark.filterwarnings("default")
def test_speed_on_a_cpu_measures_and_passes_nothing(tmp_path: Path) -> None:
    part = run("speed", speed.speed, Setting(device="cpu", folder=tmp_path, small=True))
    assert part.status == MEASURED, part
    assert {row.status for row in part.rows} == {MEASURED, NOT_RUN}
    measured = {row.what.rsplit(": ")[-1]: row for row in part.rows if row.status == MEASURED}
    assert list(measured) == [
        "reading and writing the weights once",
        "official NOLA's way",
        "torch._int_mm's int8 rate at 64^3",
        "PEFT get_delta_weight in float32",
        "PEFT LoRA r=8",
    ]
    wanted = [row.numbers["wanted"] for row in measured.values()]
    assert wanted == ["<= 2", ">= 8", ">= 0.4", ">= 8", "<= 1.2"]
    for row in measured.values():
        assert f"wanted {row.numbers['wanted']}: " in row.found
    assert [row.found for row in part.rows if row.status == NOT_RUN] == [
        "not run: CUDA graphs need CUDA",
        "not run: CUDA graphs need CUDA",
        "not run: memory is counted on CUDA only",
    ]


@pytest.mark.parametrize(
    ("sense", "bound", "ratio", "verdict"),
    [("<=", 2, 0.5, "holds"), ("<=", 0.4, 0.5, "MISSED"), (">=", 2, 2.0, "holds"),
     (">=", 2.1, 2.0, "MISSED")],
)  # fmt: skip
def test_a_target_says_whether_it_holds(
    sense: Any, bound: float, ratio: float, verdict: str
) -> None:
    """A cost is ours over theirs, a speed the other way round."""
    wanted = Threshold(sense=sense, bound=bound)
    found = Measure(what="x", against="y", ours=0.001, theirs=0.002, wanted=wanted)
    assert (found.ratio, found.verdict) == (ratio, verdict)
    assert found.to_json()["holds"] is (verdict == "holds")
    assert found.row().status == MEASURED
    said = f"{ratio:.2f}x, wanted {sense} {bound:g}: {verdict} (1.000 against 2.000 ms)"
    assert found.row().found == said


def test_opponents_take_turns_and_the_best_counts() -> None:
    """A run that is slow while it warms up, and once later, is timed by its other turns."""
    order: list[str] = []

    def ours() -> None:
        order.append("ours")
        sleep(0.05 if order.count("ours") in (1, 2, 4) else 0.001)

    runs = {"ours": ours, "theirs": lambda: order.append("theirs")}
    found = measure.side_by_side(runs, torch.device("cpu"), turns=3)
    assert order == ["ours", "theirs"] * 5
    assert 0.001 <= found["ours"] < 0.05


def test_too_little_memory_is_no_failure_of_the_others() -> None:
    def rows() -> Iterator[PartRow]:
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    [row] = guarded("official NOLA", rows())
    assert (row.status, row.found) == (NOT_RUN, "not run: the GPU's memory is too small")


def test_memory_of_a_step_is_counted_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """`peak` asks torch in the right order: what is there before is not counted."""
    held, most = [100], [0]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda device: most.__setitem__(0, held[0])
    )
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: held[0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: most[0])
    most[0] = 10_000  # from before

    def run() -> None:
        most[0] = max(most[0], held[0] + 42)

    assert measure.peak(run, torch.device("cuda")) == 42


def test_a_missing_opponent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingPackageError, match="peft"):
        speed.peft_deltas(2, [torch.Size((4, 4))], torch.device("cpu"))


def test_peft_multiplies_by_its_own_code() -> None:
    """Each layer's update is made: a layer of PEFT without its code would leave nothing to time."""
    peft = pytest.importorskip("peft")
    made: list[torch.Size] = []
    real = peft.tuners.randlora.Linear.get_delta_weight
    with pytest.MonkeyPatch.context() as patch:

        def spy(layer: Any, adapter: str) -> Any:
            found = real(layer, adapter)
            made.append(found.shape)
            assert found.dtype == torch.float32
            return found

        patch.setattr(peft.tuners.randlora.Linear, "get_delta_weight", spy)
        speed.peft_deltas(4, [torch.Size((8, 12)), torch.Size((12, 8))], torch.device("cpu"))()
    assert made == [(8, 12), (12, 8)]


def test_the_benchmark_prints_ratios_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench = benchmark("gpu")
    good = Measure(what="NOLA", against="them", ours=0.001, theirs=0.01)
    bad = Measure(
        what="step", against="PEFT", ours=2**21, theirs=2**20, unit="B",
        wanted=Threshold(sense="<=", bound=1),
    )  # fmt: skip
    missing = PartRow(what="RandLoRA", found="not run: peft is not installed", status=NOT_RUN)
    monkeypatch.setattr(speed, "measures", lambda setting: iter([good, bad, missing]))
    monkeypatch.setattr(
        sys, "argv", ["gpu.py", "--device", "cpu", "--json", f"{tmp_path}/x/y.json"]
    )
    assert bench.main() == 0
    *_, first, second, third = capsys.readouterr().out.splitlines()
    assert " ".join(first.split()) == "10.00x 1.000 ms 10.000 ms NOLA: them"
    assert " ".join(second.split()) == "2.00x <= 1 2.000 MiB 1.000 MiB step: PEFT MISSED"
    assert third == "RandLoRA: not run: peft is not installed"
    saved = json.loads((tmp_path / "x" / "y.json").read_text())
    assert saved["rows"] == [good.to_json(), bad.to_json()]
    assert {"processor", "devices", "driver" if torch.cuda.is_available() else "versions"} <= set(
        saved["machine"]
    )


def benchmark(name: str) -> Any:
    """A script of benchmarks/, whose folder holds what it imports."""
    folder = Path(__file__).parents[2] / "benchmarks"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        return importlib.import_module(name)
