"""What apply serves, what it refuses, what a probe stops, what a rollback brings."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from kilodelta.cli import main
from kilodelta.device import Device, apply, rollback, status
from kilodelta.device.folder import DeviceFolder, state
from kilodelta.device.folder.change import locked
from kilodelta.device.golden import golden
from kilodelta.device.golden.golden import Golden
from kilodelta.device.update import admit
from kilodelta.errors import (
    BaseMismatchError,
    DeviceError,
    DowngradeError,
    FileError,
    LockedError,
    ProofError,
)
from kilodelta.files.tensor import RawTensor
from kilodelta.format.delta import Delta
from kilodelta.format.file import load
from kilodelta.verify.parity.gate import Limit
from tests.doubles import numpy_device
from tests.doubles.numpy_device import BATCH, TOLERANCE
from tests.support.devices import Bench


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


def test_a_probe_in_the_file_decides(bench: Bench) -> None:
    good = bench.probed("a", outputs={"y": bench.outputs["a"][:2]})
    seen = apply(bench.device, good).seen
    assert seen.limits == {"y": golden.limits_of(load(good), "float32")["y"]}
    assert seen.errors["y"].relative_l2 < 1e-6
    bad = bench.probed("b", outputs={"y": bench.outputs["b"][:2] * np.float32(1.0001)})
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
    assert apply(bench.device, bench.probed("a", outputs=wrong, dtype="float16")).seen.errors == {}


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


class TestVersions:
    """One file of a version far ahead must not lock the device out of every later release."""

    FAR = (1 << 63) - 1

    def test_a_version_far_ahead_is_refused_with_a_way_out(self, bench: Bench) -> None:
        file = bench.save("far", 1, version=self.FAR)
        with pytest.raises(DowngradeError, match="takes none above 1000000") as caught:
            apply(bench.device, file)
        assert "--allow-jump" in caught.value.fix
        assert "release it with version 1" in caught.value.fix
        assert status(bench.device).state == state.State()
        apply(bench.device, bench.save("next", 2, version=1))

    def test_a_downgrade_allows_no_jump(self, bench: Bench) -> None:
        with pytest.raises(DowngradeError):
            apply(bench.device, bench.save("far", 1, version=self.FAR), allow_downgrade=True)

    def test_a_jump_may_be_allowed(self, bench: Bench) -> None:
        done = apply(bench.device, bench.save("far", 1, version=20_261_128), allow_jump=True)
        assert done.state.highest == 20_261_128
        apply(bench.device, bench.save("next", 2, version=20_261_129))

    @pytest.mark.parametrize(("version", "is_taken"), [(15, True), (16, False)])
    def test_the_bundle_says_how_far(self, bench: Bench, version: int, is_taken: bool) -> None:
        bench.change_bundle(lambda table: table.update(max_jump=10))
        apply(bench.device, bench.save("first", 1, version=5))
        file = bench.save("second", 2, version=version)
        if is_taken:
            assert apply(bench.device, file).state.highest == version
            return
        with pytest.raises(DowngradeError, match="has had version 5 and takes none above 15"):
            apply(bench.device, file)


class TestCeilings:
    """A probe that could not fail proves nothing."""

    @pytest.mark.parametrize(
        "limit",
        [
            Limit(relative_l2=float("inf"), relative_max=1e-5),
            Limit(relative_l2=1e-5, relative_max=float("inf")),
            Limit(relative_l2=1e30, relative_max=1e30),
            Limit(relative_l2=0.011, relative_max=1e-5),
        ],
    )
    def test_a_limit_above_the_ceiling_is_refused(self, bench: Bench, limit: Limit) -> None:
        file = bench.probed("a", outputs={"y": bench.outputs["b"][:2]}, limit=limit)
        with pytest.raises(
            ProofError, match=r"lets output 'y' be off by .* up to 0\.01 in float32"
        ):
            apply(bench.device, file)
        assert bench.serves() == "base"
        assert bench.events()[-1] == "failed"
        assert "built" not in bench.events(), "refused before anything was built"

    def test_the_bundle_says_how_high(self, bench: Bench) -> None:
        limit = Limit(relative_l2=0.5, relative_max=0.5)
        file = bench.probed(
            "a", outputs={"y": bench.outputs["a"][:2] * np.float32(1.1)}, limit=limit
        )
        with pytest.raises(ProofError, match="takes limits up to"):
            apply(bench.device, file)
        bench.change_bundle(lambda table: table.update(ceiling=0.5))
        assert apply(bench.device, file).seen.limits == {"y": limit}

    def test_a_limit_that_is_no_number_is_refused(self, bench: Bench) -> None:
        limit = Limit(relative_l2=float("nan"), relative_max=1e-5)
        with pytest.raises(FileError, match="not two float32 numbers"):
            apply(
                bench.device, bench.probed("a", outputs={"y": bench.outputs["a"][:2]}, limit=limit)
            )

    def test_limits_of_other_precisions_are_not_looked_at(self, bench: Bench) -> None:
        limit = Limit(relative_l2=float("inf"), relative_max=float("inf"))
        outputs = {"y": bench.outputs["a"][:2]}
        apply(bench.device, bench.probed("a", outputs=outputs, dtype="float16", limit=limit))


def test_what_is_proved_is_said(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    done = apply(bench.device, bench.files["a"])
    assert done.to_json()["result"] == {
        "root": load(bench.files["a"]).manifest.result,
        "proved": True,
    }
    monkeypatch.setattr(numpy_device.StandIn, "proves_result", False)
    arguments = ["apply", str(bench.device), str(bench.files["b"])]
    shown = CliRunner().invoke(main, arguments).stdout
    assert "not proved: weights are not merged here" in shown
    assert not apply(bench.device, bench.files["a"]).result_proved


def test_texts_of_a_file_are_escaped_in_errors_and_journal(bench: Bench) -> None:
    other = numpy_device.base(bench.root / "other.safetensors", seed=1)
    delta = numpy_device.delta(other, 1)
    name = "\x1b]0;x\x07\x1b[32mproved\n  fix: nothing"
    base = replace(delta.manifest.base, name=name)
    file = bench.write("esc", replace(delta, manifest=replace(delta.manifest, base=base)))
    with pytest.raises(BaseMismatchError) as caught:
        apply(bench.device, file)
    assert r"(\x1b]0;x\x07\x1b[32mproved\n  fix: nothing, 3 tensors)" in caught.value.what
    assert "\x1b" not in (bench.device / "journal").read_text()


def test_a_file_that_is_a_pipe_is_not_waited_for(bench: Bench) -> None:
    os.mkfifo(bench.root / "pipe.kd")
    with pytest.raises(FileError):
        apply(bench.device, bench.root / "pipe.kd")
