"""What lies in a device folder: read with distrust, checked, and repaired after a loss."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kilodelta.device import Device, apply, rollback, status
from kilodelta.device.folder import DeviceFolder
from kilodelta.errors import DeviceError, KiloDeltaError, ProofError
from tests.doubles.numpy_device import BATCH
from tests.support.devices import Bench


def test_no_device_folder(bench: Bench) -> None:
    for step in (lambda: apply(bench.root, bench.files["a"]), lambda: status(bench.root)):
        with pytest.raises(DeviceError, match=r"no bundle\.json"):
            step()


def test_a_folder_that_was_copied_in_part(bench: Bench) -> None:
    (bench.device / "deltas").rmdir()
    with pytest.raises(DeviceError, match="it has no deltas"):
        apply(bench.device, bench.files["a"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.update(version=3), "version is 3; this kilodelta reads 1 and 2"),
        (lambda t: t.update(mode="magic"), "mode is 'magic'"),
        (lambda t: t.pop("limits"), "lacks 'limits'"),
        (lambda t: t["limits"]["y"].update(relative_l2=-1), "not a number from 0 to 1e300"),
        (lambda t: t["files"][0].update(file="../x"), "not a file name"),
        (lambda t: t.update(keep=True), "keep is True"),
        (lambda t: t["limits"]["y"].update(relative_l2=10**400), "a number has 401 digits"),
        (lambda t: t["limits"]["y"].update(relative_l2=1e301), r"relative_l2 is 1e\+301"),
        (lambda t: t["limits"]["y"].update(relative_max=True), "relative_max is True"),
        (lambda t: t["limits"]["y"].update(relative_max=None), "relative_max is None"),
        (lambda t: t.update(ceiling=10**400), "a number has 401 digits"),
        (lambda t: t.update(ceiling=float("inf")), "Infinity is not JSON"),
        (lambda t: t.update(max_jump=1 << 63), "max_jump is 9223372036854775808"),
        (lambda t: t.pop("ceiling"), "lacks 'ceiling'"),
        (lambda t: t.update(version=True), "version is True"),
        (lambda t: t.update(version=1), "unknown key 'ceiling'"),
        (lambda t: t["base"].update(root="sha256:1"), "base.root is not sha256"),
        (lambda t: t.update(tool="x" * (1 << 20)), "has more than 1048576 bytes"),
    ],
)
def test_a_bundle_is_read_with_distrust(bench: Bench, change: Any, said: str) -> None:
    bench.change_bundle(change)
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


def test_a_bundle_of_version_1_has_the_limits_of_its_precision(bench: Bench) -> None:
    def old(table: dict[str, Any]) -> None:
        table.update(version=1, dtype="float16")
        del table["ceiling"], table["max_jump"]

    bench.change_bundle(old)
    assert (status(bench.device).bundle.ceiling, status(bench.device).bundle.max_jump) == (
        0.1,
        10**6,
    )


def test_tensors_of_another_base_are_refused(bench: Bench) -> None:
    place = bench.device / "base" / "tensors.json"
    rows = json.loads(place.read_text())
    rows[0][3] = "sha256:" + "0" * 64
    place.write_text(json.dumps(rows))
    with pytest.raises(DeviceError, match="gives the root sha256:"):
        apply(bench.device, bench.files["a"])


PARTS = ("deltas", "base", "lock", "journal", "current", "bundle.json", "base/golden.npz")


class TestFolderOfAStranger:
    """Nobody's files are touched but the folder's own, and nothing waits for ever."""

    @pytest.fixture
    def victim(self, tmp_path: Path) -> Path:
        """The user's own files, elsewhere."""
        home = tmp_path / "home"
        (home / "d").mkdir(parents=True)
        (home / "d" / "photo").write_text("photo")
        (home / "photo").write_text("photo")
        (home / "rc").write_text("line\n")
        return home

    @staticmethod
    def contents(folder: Path) -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    @staticmethod
    def put(place: Path, how: Callable[[Path], object]) -> None:
        """Put something else in the place of a part of the folder."""
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
        how(place)

    @staticmethod
    def everything(bench: Bench) -> None:
        """All commands; each ends well or in a sentence."""
        for act in (
            lambda: apply(bench.device, bench.files["a"]),
            lambda: rollback(bench.device),
            lambda: status(bench.device, check=True),
            lambda: Device(bench.device).run(BATCH),
        ):
            with contextlib.suppress(KiloDeltaError):
                act()

    @pytest.mark.parametrize("part", PARTS)
    def test_a_link_leads_nowhere(self, bench: Bench, victim: Path, part: str) -> None:
        place = bench.device / part
        target = victim if place.is_dir() else victim / "rc"
        before = self.contents(victim)
        self.put(place, lambda path: path.symlink_to(target))
        self.everything(bench)
        assert self.contents(victim) == before

    @pytest.mark.parametrize("part", PARTS)
    def test_a_link_is_named(self, bench: Bench, victim: Path, part: str) -> None:
        place = bench.device / part
        target = victim if place.is_dir() else victim / "rc"
        self.put(place, lambda path: path.symlink_to(target))
        if part == "current":  # written anew from the journal, over the link
            apply(bench.device, bench.files["a"])
            assert not place.is_symlink()
            return
        with pytest.raises(KiloDeltaError, match=f"{part.rpartition('/')[2]} .*is a link"):
            apply(bench.device, bench.files["a"])

    @pytest.mark.parametrize("part", PARTS)
    def test_a_pipe_is_not_waited_for(self, bench: Bench, part: str) -> None:
        self.put(bench.device / part, os.mkfifo)
        self.everything(bench)

    @pytest.mark.parametrize("part", PARTS)
    def test_a_device_that_never_ends_is_not_read(self, bench: Bench, part: str) -> None:
        self.put(bench.device / part, lambda path: path.symlink_to("/dev/zero"))
        self.everything(bench)

    def test_what_the_base_is_remembered_by_may_be_no_link(
        self, bench: Bench, victim: Path
    ) -> None:
        (bench.device / "baseline.npz").symlink_to(victim / "rc")
        before = self.contents(victim)
        apply(bench.device, bench.files["a"])
        assert self.contents(victim) == before
        assert not (bench.device / "baseline.npz").is_symlink()

    def test_what_is_remembered_elsewhere_is_computed_anew(
        self, bench: Bench, victim: Path
    ) -> None:
        apply(bench.device, bench.files["a"])
        place = bench.device / "baseline.npz"
        shutil.move(place, victim / "baseline.npz")
        place.symlink_to(victim / "baseline.npz")
        apply(bench.device, bench.files["b"])
        assert not place.is_symlink()

    @pytest.mark.parametrize("how", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
    def test_a_fine_tune_holds_regular_files_only(self, bench: Bench, how: Any) -> None:
        done = apply(bench.device, bench.files["a"])
        place = bench.device / "deltas" / done.state.serving.folder / "a.weight.npy"
        self.put(place, how)
        with pytest.raises(DeviceError, match=r"a\.weight\.npy is a (pipe|link)"):
            Device(bench.device).run(BATCH)
        with pytest.raises(KiloDeltaError, match=r"a\.weight\.npy is a (pipe|link)"):
            status(bench.device, check=True)

    def test_a_served_folder_that_is_a_link(self, bench: Bench, victim: Path) -> None:
        done = apply(bench.device, bench.files["a"])
        self.put(
            bench.device / "deltas" / done.state.serving.folder,
            lambda path: path.symlink_to(victim),
        )
        before = self.contents(victim)
        with pytest.raises(DeviceError, match="is a link"):
            Device(bench.device).run(BATCH)
        self.everything(bench)
        assert self.contents(victim) == before

    def test_links_in_deltas_go_and_what_they_lead_to_stays(
        self, bench: Bench, victim: Path
    ) -> None:
        (bench.device / "deltas" / "x").symlink_to(victim)
        (bench.device / ".current.7.tmp").symlink_to(victim / "rc")
        before = self.contents(victim)
        apply(bench.device, bench.files["a"])
        assert self.contents(victim) == before
        assert bench.is_clean()

    def test_files_of_the_user_in_the_folder_stay(self, bench: Bench) -> None:
        (bench.device / "notes.tmp").write_text("mine")
        apply(bench.device, bench.files["a"])
        assert (bench.device / "notes.tmp").read_text() == "mine"

    def test_a_folder_of_hard_links_writes_into_no_other(self, bench: Bench) -> None:
        """`cp -al` makes a copy whose files are the same ones."""
        apply(bench.device, bench.files["b"])
        other = bench.root / "other"
        shutil.copytree(bench.device, other, copy_function=os.link)
        (other / "lock").write_text("held by nobody")
        before = self.contents(other)
        apply(bench.device, bench.files["a"])
        assert bench.serves(check=True) == "a"
        assert self.contents(other) == before
