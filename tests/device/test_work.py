"""How much work a stranger's file may ask for: on a device the bundle says, before it is begun."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from kilodelta.cli import main
from kilodelta.device import apply, run, status
from kilodelta.device.golden import golden
from kilodelta.device.golden.golden import Golden
from kilodelta.errors import DeviceError, FileError, ProofError
from kilodelta.files.npz import write_npz
from tests.doubles import numpy_device
from tests.doubles.numpy_device import BATCH
from tests.support.devices import Bench
from tests.support.processes import GOLDEN


def test_the_bundle_limits_the_work_before_it_is_begun(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begun(*_: Any) -> None:
        raise AssertionError("it was expanded")

    bench.change_bundle(lambda table: table.update(max_work=100))
    assert status(bench.device).to_json()["max_work"] == 100
    with monkeypatch.context() as patch:
        for name in ("build", "trial"):
            patch.setattr(numpy_device.StandIn, name, begun)
        with pytest.raises(FileError, match=r"1e\+02 are allowed") as caught:
            apply(bench.device, bench.files["a"])
        write_npz(bench.root / "x.npz", BATCH)
        with pytest.raises(FileError, match="are allowed"):
            run(bench.device, bench.root / "x.npz", delta=[bench.files["a"]])
    assert bench.serves() == "base"
    enough = re.search(r"--max-work (\S+),", caught.value.fix)
    assert enough is not None
    apply(bench.device, bench.files["a"], max_work=float(enough[1]))


def test_a_bundle_without_a_limit_takes_what_suits_its_base(bench: Bench) -> None:
    assert "max_work" not in json.loads((bench.device / "bundle.json").read_text())
    apply(bench.device, bench.files["a"])
    assert bench.serves(check=True) == "a"


@pytest.mark.parametrize("value", [-1, "1e9", None, True, 10**299, float("nan")])
def test_an_odd_limit_is_refused(bench: Bench, value: Any) -> None:
    bench.change_bundle(lambda table: table.update(max_work=value))
    if value == 10**299:  # a limit that limits nothing is one
        apply(bench.device, bench.files["a"])
        return
    with pytest.raises(DeviceError, match=r"max_work|NaN"):
        apply(bench.device, bench.files["a"])


def test_a_probe_may_not_take_far_longer_than_the_bundle_own(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = BATCH["x"].repeat(200, axis=0)
    probes = golden.to_probes(Golden(inputs={"x": rows}, outputs={"y": rows[:, :5]}), {})
    file = bench.save("a-long", 1, probes=probes)
    apply(bench.device, file)  # far below what any probe may take
    monkeypatch.setattr(golden, "FREE", 0)
    with pytest.raises(ProofError, match=r"'x' \(600, 8\), which ask for far more"):
        apply(bench.device, file)


def test_tokens_count_as_often_as_a_row_is_long() -> None:
    ids = np.zeros((2, 4096), np.int64)
    assert golden.size_of({"input_ids": ids}) == 2 * 4096 * 4096
    assert golden.size_of({"pixels": np.zeros((2, 3, 8, 8), np.float32)}) == 384
    assert golden.size_of({"scalar": np.zeros((), np.int64)}) == 1


@pytest.mark.parametrize(
    "command",
    [
        ["merge", "BASE", "FILE", "-o", "OUT"],
        ["verify", "BASE", "FILE"],
        ["export", "BASE", "FILE", "-o", "OUT"],
    ],
    ids=lambda command: command[0],
)
def test_commands_take_a_limit(command: list[str], tmp_path: Path) -> None:
    if command[0] == "export":
        pytest.importorskip("onnxscript")
    places = {
        "BASE": str(GOLDEN / "base.safetensors"),
        "FILE": str(GOLDEN / "nola-8.kd"),
        "OUT": str(tmp_path / "out.safetensors"),
    }
    words = [places.get(word, word) for word in command]
    done = CliRunner().invoke(main, [*words, "--max-work", "1000"])
    assert done.exit_code == FileError.exit_code
    assert "1e+03 are allowed" in done.output
    assert not (tmp_path / "out.safetensors").exists()
    if command[0] != "export":
        done = CliRunner().invoke(main, [*words, "--max-work", "1e12"])
        assert done.exit_code == 0, done.output
