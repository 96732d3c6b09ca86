"""Systems that lack calls: the same results without them, or a sentence instead of a traceback."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import kilodelta
from kilodelta.errors import LockedError, OutputError
from kilodelta.files import digest_cache, staging, system
from tests.support import making
from tests.support.processes import GOLDEN

BASE, FILE = GOLDEN / "base.safetensors", GOLDEN / "nola-8.kd"
POSITIONAL = ("pread", "pwrite", "preadv", "copy_file_range", "sched_getaffinity", "geteuid")


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Take away what Windows lacks: positional calls, flock, owners, descriptors of folders."""
    for name in POSITIONAL:
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(system, "fcntl", None)
    monkeypatch.setattr(system, "HAS_FOLDER_DESCRIPTORS", False)
    return monkeypatch


@pytest.mark.parametrize("name", POSITIONAL)
def test_one_missing_call_changes_no_byte(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kilodelta.merge(BASE, FILE, tmp_path / "with.safetensors")
    monkeypatch.delattr(os, name, raising=False)
    kilodelta.merge(BASE, FILE, tmp_path / "without.safetensors", threads=2)
    files = [tmp_path / f"{name}.safetensors" for name in ("with", "without")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.usefixtures("windows")
def test_a_folder_is_merged_without_any_of_them(tmp_path: Path) -> None:
    base = making.folder(tmp_path / "base", making.model(), shards=2)
    (base / "inner").mkdir()
    (base / "inner" / "notes.txt").write_text("inner")
    (base / "link").symlink_to("/etc")
    tune = making.delta(base, making.METHODS[0])
    done = kilodelta.merge(base, tune, tmp_path / "merged")
    assert done.result == tune.manifest.result
    assert (tmp_path / "merged" / "tokenizer" / "vocab.txt").read_text() == "a\nb\n"
    assert (tmp_path / "merged" / "inner" / "notes.txt").read_text() == "inner"
    assert not (tmp_path / "merged" / "link").exists()
    assert kilodelta.digest(tmp_path / "merged").root


@pytest.mark.usefixtures("windows")
@pytest.mark.parametrize("platform", ["linux", "win32"])
def test_beginning_to_write_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    system._sync_file_range.cache_clear()
    with (tmp_path / "file").open("w+b") as file:
        file.write(b"bytes")
        file.flush()
        system.begin_sync(file.fileno(), 0, 5)
        system.begin_sync(file.fileno(), 1 << 40, 5)  # an error is left to `sync`
    system._sync_file_range.cache_clear()
    assert (tmp_path / "file").read_bytes() == b"bytes"


def test_reads_of_threads_do_not_meet(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    data = np.arange(40_000, dtype="<u4")
    data.tofile(tmp_path / "numbers")
    descriptor = os.open(tmp_path / "numbers", os.O_RDONLY)
    try:

        def part(start: int) -> bool:
            view = memoryview(bytearray(400))
            assert system.read_into(descriptor, view, 4 * start) == 400
            return np.array_equal(np.frombuffer(view, "<u4"), data[start : start + 100])

        with ThreadPoolExecutor(8) as threads:
            assert all(threads.map(part, range(0, 39_900, 7)))
    finally:
        os.close(descriptor)


def test_the_cache_of_digests_works_without_owners(windows: pytest.MonkeyPatch) -> None:
    assert kilodelta.digest(BASE).root == kilodelta.digest(BASE, cached=True).root
    assert digest_cache.folder().exists()


def test_windows_own_locks_are_taken(windows: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A double of msvcrt: one byte, far behind the text, that one descriptor at a time holds."""
    held: list[int] = []

    def locking(descriptor: int, mode: int, count: int) -> None:
        assert (mode, count) == (2, 1)
        assert os.lseek(descriptor, 0, os.SEEK_CUR) > 1 << 20
        if held:
            raise OSError(36, "Resource deadlock avoided")
        held.append(descriptor)

    double = types.ModuleType("msvcrt")
    double.locking, double.LK_NBLCK = locking, 2  # type: ignore[attr-defined]
    windows.setitem(sys.modules, "msvcrt", double)
    (tmp_path / "lock").touch()
    files = [os.open(tmp_path / "lock", os.O_RDWR) for _ in range(2)]
    try:
        assert [system.try_lock(file) for file in files] == [True, False]
    finally:
        for file in files:
            os.close(file)


class TestDeviceFolder:
    """The device folder takes its lock, or says that there is none."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> types.SimpleNamespace:
        return types.SimpleNamespace(lock=tmp_path / "lock", path=tmp_path)

    def test_it_is_held_once(self, folder: types.SimpleNamespace) -> None:
        from kilodelta.device.folder.change import locked

        with (
            locked(folder),  # type: ignore[arg-type]
            pytest.raises(LockedError, match="is being changed by"),
            locked(folder),  # type: ignore[arg-type]
        ):
            raise AssertionError("two held it")

    def test_without_locks_nothing_is_changed(
        self, folder: types.SimpleNamespace, windows: pytest.MonkeyPatch
    ) -> None:
        from kilodelta.device.folder.change import locked

        windows.setitem(sys.modules, "msvcrt", None)
        with (
            pytest.raises(OutputError, match="has no locks"),
            locked(folder),  # type: ignore[arg-type]
        ):
            raise AssertionError("it was changed")


def test_folders_are_not_pushed_to_the_disk_where_none_can_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    staging.sync(tmp_path)  # no error, though no descriptor is made
    (tmp_path / "file").write_text("x")
    staging.sync(tmp_path / "file")
