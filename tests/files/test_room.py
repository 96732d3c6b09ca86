"""Disks are asked for room before a work begins."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest

from kilodelta.errors import InputError, MissingPackageError, OutputError
from kilodelta.files.staging import Need, new_folder, require_room
from kilodelta.report.write import require_page
from tests.support.disks import with_free


def need(path: Path, nbytes: int, what: str = "the file") -> Need:
    return Need(path=path, nbytes=nbytes, what=what)


def test_both_numbers_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, 4096)
    require_room(need(tmp_path / "a", 4096))
    with pytest.raises(OutputError) as caught:
        require_room(need(tmp_path / "a", 12_000), fix="give another folder with -o")
    assert caught.value.what == f"12 KB are needed for the file, and {tmp_path} has 4.1 KB free"
    assert caught.value.fix == "free some space, or give another folder with -o"


def test_numbers_that_would_read_alike_are_said_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, 4096)
    with pytest.raises(
        OutputError, match=r"4,097 bytes are needed for the file, and .* has 4,096 bytes free"
    ):
        require_room(need(tmp_path / "a", 4097))


def test_what_lies_on_one_disk_is_asked_for_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, 100)
    (tmp_path / "other").mkdir()
    one, other = need(tmp_path / "a", 60), need(tmp_path / "other" / "new" / "b", 60, "its state")
    require_room(one)
    require_room(other)
    with pytest.raises(
        OutputError, match=r"120 B are needed for the file \(60 B\), its state \(60 B\), and"
    ):
        require_room(one, other)
    stat, here = os.stat, os.stat(tmp_path / "other")
    apart = os.stat_result((*here[:2], here.st_dev + 1, *here[3:]))
    monkeypatch.setattr(
        os, "stat", lambda path, **k: apart if path == tmp_path / "other" else stat(path, **k)
    )
    require_room(one, other)


def test_nothing_is_asked_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, 0)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    require_room(need(tmp_path / "a", 0))


def test_a_folder_that_takes_no_file_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file cannot be written to, and the file would lie"):
        require_room(need(tmp_path / "file" / "a", 1))
    with_free(monkeypatch, 1000)  # which asks the system in the same way
    Status = namedtuple("Status", "f_files f_favail")
    monkeypatch.setattr(os, "statvfs", lambda path: Status(9, 0))
    with pytest.raises(OutputError, match=r"no free inode"):
        require_room(need(tmp_path / "a", 1))
    monkeypatch.setattr(os, "statvfs", lambda path: Status(0, 0))  # btrfs numbers none
    require_room(need(tmp_path / "a", 1))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(OutputError, match=r"cannot be written to, and the file would lie there"):
        require_room(need(tmp_path / "a", 1))


def test_a_temporary_place_is_changed_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, 0)
    with pytest.raises(OutputError) as caught:
        require_room(need(tmp_path / "a", 1))
    assert "TMPDIR" not in caught.value.fix or str(tmp_path).startswith(tempfile.gettempdir())
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    with pytest.raises(OutputError, match=r"has 0 B free") as caught:
        require_room(need(tmp_path / "a", 1))
    assert "set TMPDIR" in caught.value.fix


def test_a_stage_is_named_by_the_folder_that_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, 0)
    with (
        pytest.raises(OutputError, match=f"and {tmp_path} has 0 B free"),
        new_folder(tmp_path / "out") as stage,
    ):
        require_room(need(stage / "weights", 1))
    assert not any(tmp_path.iterdir())


def test_a_disk_that_is_really_small(tmp_path: Path) -> None:
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this process may mount nothing")
    try:
        require_room(need(tmp_path / "a", 60_000))
        with pytest.raises(OutputError, match=r"70 KB are needed .* has 65.5 KB free"):
            require_room(need(tmp_path / "a", 70_000))
        (tmp_path / "half").write_bytes(bytes(32_768))
        with pytest.raises(OutputError, match=r"has 32.8 KB free"):
            require_room(need(tmp_path / "a", 60_000))
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_report_is_asked_for_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.suppress(MissingPackageError):
        require_page(tmp_path / "page.html")
    with pytest.raises(InputError):
        require_page(tmp_path / "page.txt")
    with_free(monkeypatch, 1000)
    with pytest.raises(OutputError, match=r"200 KB are needed for the report") as caught:
        require_page(tmp_path / "page.html")
    assert "--report" in caught.value.fix
