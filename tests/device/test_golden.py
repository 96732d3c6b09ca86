"""What a device remembers of its base, and outputs in which NaN and infinity are right."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kilodelta.device import Device, apply
from kilodelta.device.golden import base_outputs, computer, golden, probe
from kilodelta.device.golden.golden import Golden
from kilodelta.device.golden.probe import require_finite
from kilodelta.errors import ProofError
from kilodelta.files import npz
from tests.doubles import numpy_device
from tests.doubles.numpy_device import BATCH
from tests.support.devices import Bench

INF, NAN = np.inf, np.nan


# what is remembered


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note every time that a base's outputs are computed for an apply."""
    notes: list[str] = []
    real = probe.require_close

    def note(*arguments: Any) -> Any:
        notes.append("computed")
        return real(*arguments)

    monkeypatch.setattr(base_outputs, "require_close", note)
    return notes


def test_a_base_is_computed_once(bench: Bench, computed: list[str]) -> None:
    apply(bench.device, bench.files["a"])
    apply(bench.device, bench.files["b"])
    assert computed == ["computed"]


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(numpy_device.StandIn, "runtime", "numpy 2"),
        lambda patch: patch.setattr(computer, "_cores", lambda: 99),
        lambda patch: patch.setattr(computer, "_processor", lambda: "processor 0"),
        lambda patch: patch.setattr(computer, "_gpus", lambda: "another GPU"),
        lambda patch: patch.setattr("platform.machine", lambda: "riscv64"),
    ],
    ids=["runtime", "cores", "processor", "graphics", "machine"],
)
def test_what_another_computer_remembered_is_not_used(
    bench: Bench, computed: list[str], monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    """A folder cloned to it would be compared with the first one's bits."""
    apply(bench.device, bench.files["a"])
    change(monkeypatch)
    apply(bench.device, bench.files["b"])
    apply(bench.device, bench.files["a"])
    assert computed == ["computed"] * 2


def test_outputs_of_the_base_that_another_computer_gives_are_recognised(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clone's base is off by one bit from what was remembered, so a fine-tune that is not
    present would not be seen if that were used."""
    apply(bench.device, bench.files["a"])
    remembered = npz.read_npz(bench.device / "baseline.npz")
    name = next(name for name in remembered if name.startswith(golden.OUTPUT))
    remembered[name] = np.nextafter(remembered[name], np.float32(INF))
    npz.write_npz(bench.device / "baseline.npz", remembered)
    monkeypatch.setattr(computer, "_processor", lambda: "another")
    monkeypatch.setattr(
        numpy_device.StandIn, "open", lambda self, folder: numpy_device.of_checkpoint(self.base)
    )
    with pytest.raises(ProofError, match="the outputs are the base's"):
        apply(bench.device, bench.files["b"])


def test_what_a_release_before_remembered_is_computed_again(
    bench: Bench, computed: list[str]
) -> None:
    apply(bench.device, bench.files["a"])
    remembered = npz.read_npz(bench.device / "baseline.npz")
    remembered["runtime"] = np.frombuffer(b"numpy", np.uint8)
    npz.write_npz(bench.device / "baseline.npz", remembered)
    apply(bench.device, bench.files["b"])
    assert computed == ["computed"] * 2


def test_a_computer_is_its_processor_not_its_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(computer, "_CPUINFO", tmp_path / "cpuinfo")

    def stated(text: str) -> str:
        (tmp_path / "cpuinfo").write_text(text)
        return computer.computer("onnxruntime-cpu 1.0")

    core = "processor\t: {0}\nmodel name\t: Xeon\ncpu MHz\t\t: {1}\nflags\t\t: fpu {2}\n\n"
    first = stated(core.format(0, 2100, "avx2") + core.format(1, 2300, "avx2"))
    assert first == stated(core.format(0, 900, "avx2"))
    assert first != stated(core.format(0, 900, "avx2 avx512f"))
    arm = "processor\t: 0\nFeatures\t: fp asimd\nCPU part\t: {}\n"
    assert stated(arm.format("0xd42")) != stated(arm.format("0xd42") + arm.format("0xd05"))
    assert "GPU" not in first
    assert "GPU" in computer.computer("onnxruntime-cuda 1.0")
    (tmp_path / "cpuinfo").unlink()
    assert computer.computer("numpy")


# NaN and infinity


class Masked(numpy_device.Linear):
    """Scores of which two are masked, whatever the weights; a fine-tune may add another."""

    value = -INF

    def run(self, batch: Any) -> dict[str, np.ndarray[Any, Any]]:
        y = super().run(batch)["y"]
        y[..., 1] = self.value
        y[0, 3] = self.value
        return {"y": y}


def serve(bench: Bench, monkeypatch: pytest.MonkeyPatch, tuned: type, base: type = Masked) -> None:
    """Let the base's session and those of fine-tunes be of these classes, and the golden values."""

    def opened(self: Any, folder: Path | None) -> Any:
        if folder is None:
            return base(numpy_device.of_checkpoint(self.base).tensors)
        return tuned({name: np.load(folder / f"{name}.npy") for name in self.base.names})

    monkeypatch.setattr(numpy_device.StandIn, "open", opened)
    outputs = Device(bench.device).run(BATCH, "base")
    golden.write(bench.device / "base" / golden.FILE, Golden(inputs=BATCH, outputs=outputs))


class Nan(Masked):
    value = NAN


@pytest.mark.parametrize("kind", [Masked, Nan])
def test_a_model_that_means_infinity_or_nan_is_served(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    serve(bench, monkeypatch, kind, kind)
    apply(bench.device, bench.files["a"])
    y = Device(bench.device).run(BATCH)["y"]
    assert not np.isfinite(y[:, 1]).any()


class More(Masked):
    def run(self, batch: Any) -> dict[str, np.ndarray[Any, Any]]:
        y = super().run(batch)["y"]
        y[2, 4] = self.value
        return {"y": y}


class MoreNan(More):
    value = NAN


@pytest.mark.parametrize(("base", "tuned"), [(Masked, More), (Nan, MoreNan), (Masked, Nan),
                                             (numpy_device.Linear, Masked)])  # fmt: skip
def test_what_the_base_does_not_mean_is_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, base: type, tuned: type
) -> None:
    serve(bench, monkeypatch, tuned, base)
    with pytest.raises(ProofError, match="output y holds NaN or infinity"):
        apply(bench.device, bench.files["a"])


@pytest.mark.parametrize("kind", [Masked, Nan])
def test_the_base_is_recognised_though_it_holds_nan(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    serve(bench, monkeypatch, kind, kind)
    monkeypatch.setattr(
        numpy_device.StandIn,
        "open",
        lambda self, folder: kind(numpy_device.of_checkpoint(self.base).tensors),
    )
    with pytest.raises(ProofError, match="the outputs are the base's"):
        apply(bench.device, bench.files["a"])


def test_a_fine_tune_that_masks_by_its_inputs_says_so_by_its_golden_values() -> None:
    base = {"y": np.array([[-INF, 1.0, 2.0]], np.float32)}
    tuned = {"y": np.array([[0.5, -INF, 2.0]], np.float32)}
    with pytest.raises(ProofError, match="output y holds NaN or infinity"):
        require_finite(tuned, {}, base)
    require_finite(tuned, {}, base, {"y": np.array([[-INF, 3.0]])})
    for other in ([[INF, 3.0]], [[1.0, 3.0]], [[NAN, 3.0]]):
        with pytest.raises(ProofError):
            require_finite(tuned, {}, base, {"y": np.array(other)})


def test_labels_are_finite() -> None:
    require_finite({"label": np.array([1, 2]), "sure": np.array([True])}, {}, {})


def test_padding_may_hold_anything() -> None:
    mask = np.array([[1, 1, 0]])
    states = np.array([[[1.0], [2.0], [NAN]]])
    require_finite({"y": states}, {"attention_mask": mask}, {})
    with pytest.raises(ProofError):
        require_finite({"y": states}, {"attention_mask": mask * 0 + 1}, {})


def test_a_folder_that_was_cloned_computes_its_own(
    bench: Bench, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    apply(bench.device, bench.files["a"])
    clone = bench.root / "clone"
    shutil.copytree(bench.device, clone)
    monkeypatch.setattr(computer, "_processor", lambda: "the clone's")
    apply(clone, bench.files["b"])
    assert computed == ["computed"] * 2
    assert npz.read_npz(clone / "baseline.npz")["runtime"].tobytes() != (
        npz.read_npz(bench.device / "baseline.npz")["runtime"].tobytes()
    )
