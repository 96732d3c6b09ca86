"""A device folder: what is served, what is refused, what a probe stops, what a rollback brings."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kilodelta.device import Device, apply, modes, rollback, status
from kilodelta.device.folder import DeviceFolder, state
from kilodelta.device.folder.changing import locked
from kilodelta.device.folder.journal import Journal
from kilodelta.device.golden import golden
from kilodelta.device.golden.golden import Golden
from kilodelta.device.modes import refit, runtime
from kilodelta.device.update import admit
from kilodelta.errors import (
    BaseMismatchError,
    DeviceError,
    DowngradeError,
    FileError,
    LockedError,
    MissingPackageError,
    ProofError,
)
from kilodelta.files.tensor import RawTensor
from kilodelta.format.delta import Delta
from kilodelta.format.file import load
from tests.doubles import numpy_device
from tests.doubles.numpy_device import BATCH, TOLERANCE


@pytest.fixture(autouse=True)
def _standin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(modes.OPENERS, "patch", numpy_device.StandIn)


class Bench:
    """A base, its device folder, and two fine-tunes with what they compute."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base = numpy_device.base(root / "base.safetensors")
        self.device = numpy_device.folder(root / "device", self.base)
        self.files = {name: self.save(name, seed) for name, seed in (("a", 1), ("b", 2))}
        self.outputs = {"base": self.expected(None)}
        self.outputs |= {name: self.expected(file) for name, file in self.files.items()}

    def save(self, name: str, seed: int, **options: Any) -> Path:
        return self.write(name, numpy_device.delta(self.base, seed, **options))

    def write(self, name: str, found: Delta) -> Path:
        found.save(self.root / f"{name}.kd")
        return self.root / f"{name}.kd"

    def expected(self, file: Path | None) -> np.ndarray[Any, Any]:
        device = Device(self.device)
        return device.run(BATCH, file or "base")["y"]

    def serves(self) -> str:
        found = Device(self.device).run(BATCH)["y"]
        return next(n for n, known in self.outputs.items() if np.array_equal(found, known))

    def events(self) -> list[str]:
        return [entry["event"] for entry in Journal(self.device / "journal").entries()]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    return Bench(tmp_path)  # type: ignore[return-value]


def test_a_fresh_folder_serves_the_base(bench: Bench) -> None:
    assert bench.serves() == "base"
    assert len({known.tobytes() for known in bench.outputs.values()}) == 3
    found = status(bench.device, check=True)
    assert (found.state.serving.delta, found.unfinished, bench.events()) == ("", False, ["bundled"])


def test_what_decodes_nothing_does_not_load_numba(bench: Bench) -> None:
    apply(bench.device, bench.files["a"])
    code = (
        "import sys\n"
        "from kilodelta.device import Device, apply, rollback, run, status\n"
        "import kilodelta.device.modes.adapter, kilodelta.device.modes.patch\n"
        "import kilodelta.device.modes.refit\n"
        f"status({str(bench.device)!r}, check=True)\n"
        f"rollback({str(bench.device)!r})\n"
        "print([m for m in ('numba', 'torch', 'onnx', 'click', 'rich') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_apply_then_apply_then_roll_back_twice(bench: Bench) -> None:
    done = apply(bench.device, bench.files["a"])
    assert bench.serves() == "a"
    assert done.before == state.State()
    assert done.state.serving.folder.startswith("000001-")
    apply(bench.device, bench.files["b"])
    assert bench.serves() == "b"
    rollback(bench.device)
    assert bench.serves() == "a"
    with pytest.raises(DeviceError, match="nothing to go back to"):
        rollback(bench.device)
    assert bench.events() == [
        "bundled",
        *["proved", "built", "probed", "committed"] * 2,
        "rolled back",
        "failed",
    ]


def test_a_first_fine_tune_rolls_back_to_the_base(bench: Bench) -> None:
    apply(bench.device, bench.files["a"])
    assert rollback(bench.device).state.serving == state.BASE
    assert bench.serves() == "base"


def test_only_what_a_rollback_needs_stays_on_the_disk(bench: Bench) -> None:
    for name in ("a", "b", "a", "b"):
        apply(bench.device, bench.files[name])
    apply(bench.device, bench.files["b"])  # sweeps before it builds
    found = status(bench.device)
    assert {p.name for p in (bench.device / "deltas").iterdir()} >= found.state.names()
    assert len(list((bench.device / "deltas").iterdir())) <= 3
    assert rollback(bench.device).state.serving.version == 0
    assert bench.serves() == "a", "the same file twice is one step"


def test_an_open_device_sees_the_next_fine_tune_and_requests_of_their_own(bench: Bench) -> None:
    device = Device(bench.device)
    held = device.session()
    apply(bench.device, bench.files["a"])
    assert np.array_equal(device.run(BATCH)["y"], bench.outputs["a"])
    assert np.array_equal(device.run(BATCH, bench.files["b"])["y"], bench.outputs["b"])
    assert np.array_equal(device.run(BATCH, "base")["y"], bench.outputs["base"])
    assert np.array_equal(device.run(BATCH)["y"], bench.outputs["a"])
    assert np.array_equal(held.run(BATCH)["y"], bench.outputs["base"])


def test_a_request_file_that_was_rewritten_is_read_again(bench: Bench) -> None:
    device, file = Device(bench.device), bench.root / "any.kd"
    for name in ("a", "b"):
        file.write_bytes(bench.files[name].read_bytes())
        assert np.array_equal(device.run(BATCH, file)["y"], bench.outputs[name])


def test_a_reader_that_was_too_slow_looks_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply(bench.device, bench.files["a"])
    device, real = Device(bench.device), numpy_device.StandIn.open

    def late(self: numpy_device.StandIn, folder: Path | None) -> numpy_device.Linear:
        monkeypatch.setattr(numpy_device.StandIn, "open", real)
        for name in ("b", "a", "b"):
            apply(bench.device, bench.files[name])
        return real(self, folder)

    monkeypatch.setattr(numpy_device.StandIn, "open", late)
    assert np.array_equal(device.run(BATCH)["y"], bench.outputs["b"])


def test_an_older_file_is_refused_unless_allowed(bench: Bench) -> None:
    files = {n: bench.save(f"v{n}", n, version=n) for n in (3, 4, 5)}
    apply(bench.device, files[4])
    with pytest.raises(DowngradeError, match="version 3; this device has had version 4"):
        apply(bench.device, files[3])
    with pytest.raises(DowngradeError, match="version 0"):
        apply(bench.device, bench.files["a"])
    apply(bench.device, files[5])
    rollback(bench.device)
    with pytest.raises(DowngradeError, match="has had version 5"):
        apply(bench.device, files[3])
    done = apply(bench.device, files[3], allow_downgrade=True)
    assert (done.state.serving.version, done.state.highest) == (3, 5)
    with pytest.raises(DowngradeError):
        apply(bench.device, files[4])


@pytest.mark.parametrize("version", [-1, 1.5, "7", True])
def test_a_version_is_a_whole_number(bench: Bench, version: Any) -> None:
    with pytest.raises(FileError, match=r"made\.version is"):
        apply(bench.device, bench.save("odd", 1, version=version))


def test_a_wrong_base_is_refused_and_named(bench: Bench) -> None:
    other = numpy_device.base(bench.root / "other.safetensors", seed=1)
    file = bench.write("other", numpy_device.delta(other, 1))
    with pytest.raises(BaseMismatchError, match=r"changed: a\.weight, b\.weight, norm\.bias"):
        apply(bench.device, file)
    with pytest.raises(BaseMismatchError, match="does not hold the base"):
        Device(bench.device).run(BATCH, file)
    assert bench.serves() == "base"


def test_a_damaged_file_is_refused(bench: Bench) -> None:
    data = bytearray(bench.files["a"].read_bytes())
    data[-3] ^= 1
    bench.files["a"].write_bytes(data)
    with pytest.raises(FileError, match="does not match its digest"):
        apply(bench.device, bench.files["a"])
    with pytest.raises(FileError, match="cannot be opened"):
        apply(bench.device, bench.root / "none.kd")
    assert bench.events()[-1] == "failed"
    assert bench.serves() == "base"


def test_no_device_folder(bench: Bench) -> None:
    for step in (lambda: apply(bench.root, bench.files["a"]), lambda: status(bench.root)):
        with pytest.raises(DeviceError, match=r"no bundle\.json"):
            step()


def test_a_folder_that_was_copied_in_part(bench: Bench) -> None:
    (bench.device / "deltas").rmdir()
    with pytest.raises(DeviceError, match="it has no deltas"):
        apply(bench.device, bench.files["a"])


def test_a_file_that_changes_while_it_is_applied_is_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = admit.version_of

    def late(found: Delta) -> int:
        bench.files["a"].unlink()
        bench.files["a"].write_bytes(bench.files["b"].read_bytes())
        return real(found)

    monkeypatch.setattr(admit, "version_of", late)
    with pytest.raises(FileError, match="changed while it was read"):
        apply(bench.device, bench.files["a"])
    assert bench.serves() == "base"


def test_two_appliers_exclude_each_other_and_readers_go_on(bench: Bench) -> None:
    with locked(DeviceFolder.open(bench.device)):
        with pytest.raises(LockedError, match="is being changed by process"):
            apply(bench.device, bench.files["a"])
        with pytest.raises(LockedError):
            rollback(bench.device)
        assert bench.serves() == "base"
        assert not status(bench.device).unfinished
    apply(bench.device, bench.files["a"])


def probed(bench: Bench, name: str, *, outputs: Any, dtype: str = "float32") -> Path:
    known = Golden(inputs={"x": BATCH["x"][:2]}, outputs=outputs)
    probes = golden.to_probes(known, {dtype: {"y": TOLERANCE}})
    return bench.save(f"{name}-probed", {"a": 1, "b": 2}[name], probes=probes)


def test_a_probe_in_the_file_decides(bench: Bench) -> None:
    good = probed(bench, "a", outputs={"y": bench.outputs["a"][:2]})
    seen = apply(bench.device, good).seen
    assert seen.limits == {"y": golden.limits_of(load(good), "float32")["y"]}
    assert seen.errors["y"].relative_l2 < 1e-6
    bad = probed(bench, "b", outputs={"y": bench.outputs["b"][:2] * np.float32(1.0001)})
    with pytest.raises(ProofError, match=r"output y is off: relative L2 0\.0001 \(at most 1e-05\)"):
        apply(bench.device, bad)
    assert bench.serves() == "a"
    assert [p.name for p in (bench.device / "deltas").iterdir()] == list(
        status(bench.device).state.names()
    )
    assert bench.events()[-3:] == ["proved", "built", "failed"]
    apply(bench.device, bench.files["b"])


def test_a_probe_for_another_precision_states_nothing_here(bench: Bench) -> None:
    wrong = {"y": bench.outputs["a"][:2] + 1}
    assert apply(bench.device, probed(bench, "a", outputs=wrong, dtype="float16")).seen.errors == {}


def test_an_output_that_the_model_lacks(bench: Bench) -> None:
    known = Golden(inputs=BATCH, outputs={"z": bench.outputs["a"]})
    probes = golden.to_probes(known, {"float32": {"z": TOLERANCE}})
    with pytest.raises(ProofError, match="there is no output z; there are y"):
        apply(bench.device, bench.save("z", 1, probes=probes))


def test_a_probe_without_inputs_is_no_probe(bench: Bench) -> None:
    probes = golden.to_probes(Golden(inputs={}, outputs=bench.outputs), {})
    with pytest.raises(FileError, match="no inputs"):
        apply(bench.device, bench.save("none", 1, probes=probes))


def test_an_update_that_is_not_there_is_noticed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = numpy_device.StandIn.open
    monkeypatch.setattr(numpy_device.StandIn, "open", lambda self, folder: real(self, None))
    with pytest.raises(ProofError, match="the update is not there"):
        apply(bench.device, bench.files["a"])
    assert bench.serves() == "base"


def test_outputs_that_are_no_numbers_are_refused(bench: Bench) -> None:
    bias = RawTensor(dtype="F32", shape=(5,), data=np.full(5, np.inf, np.float32).view(np.uint8))
    file = bench.save("inf", 1, extras={"norm.bias": bias})
    with pytest.raises(ProofError, match="output y holds NaN or infinity"):
        apply(bench.device, file)
    assert bench.serves() == "base"


def test_a_device_that_computes_the_base_wrongly_takes_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = numpy_device.Linear.run
    monkeypatch.setattr(
        numpy_device.Linear, "run", lambda s, b: {"y": real(s, b)["y"] * np.float32(1.01)}
    )
    with pytest.raises(ProofError, match="the base itself is wrong on this device"):
        apply(bench.device, bench.files["a"])


def test_a_fine_tune_of_nothing_but_zeros_may_be_the_base(bench: Bench) -> None:
    found = numpy_device.delta(bench.base, 1)
    zero = replace(found, blob=np.zeros_like(found.blob))
    apply(bench.device, bench.write("zero", zero))
    assert bench.serves() == "base"


def test_status_reads_every_byte_when_asked(bench: Bench) -> None:
    done = apply(bench.device, bench.files["a"])
    place = bench.device / "deltas" / done.state.serving.folder / "a.weight.npy"
    data = bytearray(place.read_bytes())
    data[-1] ^= 1
    place.write_bytes(data)
    status(bench.device)
    with pytest.raises(ProofError, match=r"a\.weight\.npy is .* it was"):
        status(bench.device, check=True)
    apply(bench.device, bench.files["b"])
    with pytest.raises(ProofError, match="apply the file again"):
        rollback(bench.device)
    assert bench.serves() == "b"


def test_status_names_a_changed_base(bench: Bench) -> None:
    (bench.device / "base" / "golden.npz").write_bytes(b"")
    with pytest.raises(ProofError, match=r"golden\.npz is 0 bytes"):
        status(bench.device, check=True)
    with pytest.raises(DeviceError, match="copy the bundle"):
        apply(bench.device, bench.files["a"])


def change_bundle(bench: Bench, change: Any) -> None:
    place = bench.device / "bundle.json"
    table = json.loads(place.read_text())
    change(table)
    place.write_text(json.dumps(table))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.update(version=3), "version is 3; this kilodelta reads 1 and 2"),
        (lambda t: t.update(mode="magic"), "mode is 'magic'"),
        (lambda t: t.pop("limits"), "lacks 'limits'"),
        (lambda t: t["limits"]["y"].update(relative_l2=-1), "not a number from 0 to 1e300"),
        (lambda t: t["files"][0].update(file="../x"), "not a file name"),
        (lambda t: t.update(keep=True), "keep is True"),
    ],
)
def test_a_bundle_is_read_with_distrust(bench: Bench, change: Any, said: str) -> None:
    change_bundle(bench, change)
    with pytest.raises(DeviceError, match=said):
        status(bench.device)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b'{"before":[],"highest":0,"sequence":0,"serving":{"delta":"","folder":"../x","version":0}}',
        b'{"before":[],"highest":-1,"sequence":0,"serving":{"delta":"","folder":"","version":0}}',
    ],
)
def test_a_lost_state_is_written_anew_from_the_journal(bench: Bench, text: bytes) -> None:
    apply(bench.device, bench.files["a"])
    (bench.device / "current").write_bytes(text)
    with pytest.raises(DeviceError, match="cannot be read"):
        status(bench.device)
    apply(bench.device, bench.files["b"])
    assert rollback(bench.device).state.sequence == 3
    assert bench.serves() == "a"


def test_without_state_and_journal_nothing_is_guessed(bench: Bench) -> None:
    for name in ("current", "journal"):
        (bench.device / name).unlink()
    with pytest.raises(DeviceError, match="cannot be read") as caught:
        apply(bench.device, bench.files["a"])
    assert "journal is lost too" in caught.value.fix


def test_the_tensors_of_the_base_are_read_with_distrust(bench: Bench) -> None:
    (bench.device / "base" / "tensors.json").write_text('[["a","F32",[1]]]')
    with pytest.raises(DeviceError, match="is not \\[name, dtype, shape, digest\\]"):
        assert DeviceFolder.open(bench.device).tensors


def test_a_runtime_that_is_missing_is_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    change_bundle(bench, lambda table: table.update(mode="refit", runtime="tensorrt"))
    with pytest.raises(MissingPackageError, match="tensorrt is not installed"):
        apply(bench.device, bench.files["a"])
    assert status(bench.device).state == state.State()


class Engine:
    """A double of the refit engine: it notes what it is given, and saves what it took."""

    def __init__(self, path: Path, base: Path, *, flavour: str, unused: Any) -> None:
        self.given = (path.name, base.name, flavour, unused)

    def refit(self, found: Delta) -> None:
        self.result = found.manifest.result

    def save(self, path: Path) -> None:
        path.write_text(f"{self.given} {self.result}")


def test_refit_mode_saves_the_refitted_engine_beside_the_base(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refit, "RefitEngine", Engine)
    monkeypatch.setattr(runtime, "version", lambda bundle: "double 1")
    opened = lambda bundle, folder: (folder / "model.engine").read_text()  # noqa: E731
    monkeypatch.setattr(runtime, "open_runner", opened)
    folder = DeviceFolder.open(bench.device)
    refit.write_unused(folder.base, ["pooler.weight"])
    mode = refit.RefitMode(replace(folder, bundle=replace(folder.bundle, runtime="tensorrt")))
    found = load(bench.files["a"], bench.base)
    mode.build(found, tmp_path)
    given = ("model.engine", "weights.safetensors", "tensorrt", ("pooler.weight",))
    assert str(mode.open(tmp_path)) == str(mode.trial(found)) == f"{given} {found.manifest.result}"
    (folder.base / "refit.json").write_text("[]")
    with pytest.raises(DeviceError, match="refit is not an object"):
        mode.build(found, tmp_path)
