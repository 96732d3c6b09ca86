"""Results in full or not at all, with names that nobody can foresee, and nothing left behind."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kilodelta.errors import OutputError
from kilodelta.files import staging


def stages(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.startswith(".kilodelta."))


def file(path: Path, act: Callable[[Path], object], *, replace: bool = True) -> None:
    """Stage a file and do something with it."""
    with staging.new_file(path, replace=replace) as stage:
        act(stage)


def folder(path: Path, act: Callable[[Path], object]) -> None:
    """Stage a folder and do something in it."""
    with staging.new_folder(path) as stage:
        act(stage)


def fail(error: BaseException) -> None:
    raise error


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with staging.new_file(path) as stage:
        assert stage.name == path.name  # some writers act on the suffix
        stage.write_bytes(b"first")
        assert not path.exists()
        (private,) = stages(tmp_path)
        assert (tmp_path / private).stat().st_mode & 0o777 == 0o700
    assert path.read_bytes() == b"first"
    staging.write(path, b"sec", memoryview(b"ond"))
    assert path.read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_file_has_the_mode_that_open_gives(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        staging.write(tmp_path / "a", b"")
        with staging.new_folder(tmp_path / "b"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o755


def test_a_failed_block_leaves_everything_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    for error in (ValueError("x"), KeyboardInterrupt()):

        def write(stage: Path, error: BaseException = error) -> None:
            stage.write_text("new")
            raise error

        def make(stage: Path, error: BaseException = error) -> None:
            (stage / "deep").mkdir(mode=0o500)
            raise error

        with pytest.raises(type(error)):
            file(path, write)
        with pytest.raises(type(error)):
            folder(tmp_path / "b", make)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_that_may_not_be_replaced_stays(tmp_path: Path) -> None:
    path = tmp_path / "a"

    def race(stage: Path) -> None:
        stage.write_text("mine")
        path.write_text("theirs, made meanwhile")

    with pytest.raises(OutputError, match="exists already"):
        file(path, race, replace=False)
    assert path.read_text() == "theirs, made meanwhile"
    path.unlink()
    with staging.new_file(path, replace=False) as stage:
        stage.write_text("mine")
    assert path.read_text() == "mine"
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **more: object) -> None:
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", refuse)
    test_a_file_that_may_not_be_replaced_stays(tmp_path)


def test_a_folder_takes_an_empty_place_only(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.mkdir()
    with staging.new_folder(path) as stage:
        (stage / "x").write_text("1")
    assert os.listdir(path) == ["x"]
    with pytest.raises(OutputError, match="exists already"), staging.new_folder(path):
        pass

    def race(stage: Path) -> None:
        for place, text in ((stage, "mine"), (tmp_path / "g", "theirs")):
            place.mkdir(exist_ok=True)
            (place / "x").write_text(text)

    with pytest.raises(OutputError, match="exists already"):
        folder(tmp_path / "g", race)
    assert (tmp_path / "g" / "x").read_text() == "theirs"
    assert sorted(os.listdir(tmp_path)) == ["f", "g"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    if not exchanges:
        monkeypatch.setattr(staging.publish, "_exchanged", lambda *places: False)
    path = tmp_path / "f"
    path.mkdir()
    (path / "old").write_text("")
    with pytest.raises(ValueError, match="x"), staging.new_folder(path, replace=True):
        raise ValueError("x")
    assert os.listdir(path) == ["old"]
    with staging.new_folder(path, replace=True) as stage:
        (stage / "new").write_text("")
    assert os.listdir(path) == ["new"]
    assert os.listdir(tmp_path) == ["f"]


def test_a_link_to_an_output_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with staging.new_folder(tmp_path / "link") as stage:
        (stage / "x").write_text("")
    assert (tmp_path / "link").is_symlink()
    assert os.listdir(tmp_path / "real") == ["x"]


def test_an_error_of_the_block_is_not_blamed_on_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        file(tmp_path / "a", lambda stage: (tmp_path / "absent").read_bytes())
    with pytest.raises(ConnectionResetError), staging.new_folder(tmp_path / "b"):
        raise ConnectionResetError(errno.ECONNRESET, "a server went away")
    with pytest.raises(OSError, match="Input/output error"), staging.new_file(tmp_path / "a"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_a_full_disk_is_blamed_on_the_output(tmp_path: Path, number: int) -> None:
    with pytest.raises(OutputError, match=r"a cannot be written: "):
        file(tmp_path / "a", lambda stage: fail(OSError(number, os.strerror(number))))
    with pytest.raises(OutputError, match=r"b cannot be written: "):
        folder(
            tmp_path / "b",
            lambda stage: fail(PermissionError(errno.EACCES, "not here", str(stage / "x"))),
        )
    assert os.listdir(tmp_path) == []


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "x", tmp_path / "absent" / "x", tmp_path / ("n" * 300)):
        with pytest.raises(OutputError, match="cannot be written"):
            staging.write(path, b"")
    for path in (Path("."), Path(".."), Path("/")):
        with pytest.raises(OutputError, match="does not name a new"):
            staging.write(path, b"")
        with pytest.raises(OutputError), staging.new_folder(path):
            pass
    with pytest.raises(OutputError, match="cannot be written"):
        staging.write(Path("/proc/x"), b"")  # a file system on which nothing can be made
    staging_path = tmp_path / "deep" / "er" / "x"
    with staging.new_file(staging_path, parents=True) as stage:
        stage.write_text("")
    assert staging_path.exists()


def test_a_link_at_the_output_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("v")
    (tmp_path / "out").symlink_to(tmp_path / "victim")
    staging.write(tmp_path / "out", b"new")
    assert (tmp_path / "victim").read_text() == "v"
    assert not (tmp_path / "out").is_symlink()


def hold(folder: str, *, ready: str) -> None:
    """Stage a file in `folder` and wait to be killed."""
    with staging.new_file(Path(folder) / "out") as stage:
        stage.write_bytes(b"x" * 100)
        (Path(folder) / ready).write_text("")
        time.sleep(60)


def start(folder: Path, ready: str) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("spawn").Process(
        target=hold, args=(str(folder),), kwargs={"ready": ready}
    )
    process.start()
    while not (folder / ready).exists():
        time.sleep(0.01)
    return process


def test_stages_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    dead, living = start(tmp_path, "one"), start(tmp_path, "two")
    try:
        assert len(stages(tmp_path)) == 2
        assert staging.sweep(tmp_path) == []
        assert dead.pid is not None
        os.kill(dead.pid, signal.SIGKILL)
        dead.join()
        (left, other) = stages(tmp_path)
        staging.write(tmp_path / "mine", b"")
        assert len(stages(tmp_path)) == 1  # the living process's
        assert stages(tmp_path)[0] in (left, other)
    finally:
        living.terminate()
        living.join()
        staging.sweep(tmp_path)
    assert stages(tmp_path) == []


def test_only_our_own_stages_are_swept(tmp_path: Path) -> None:
    kept = [
        tmp_path / ".kilodelta.0123456789abcdef.tmp.txt",
        tmp_path / ".kilodelta.123.tmp",
        tmp_path / ".out.1.tmp",
        tmp_path / ".kilodelta.0123456789abcdeX.tmp",
    ]
    for path in kept:
        path.mkdir()
    plain = tmp_path / ".kilodelta.0123456789abcdef.tmp"
    plain.write_text("a file, so no stage")
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "lock").write_text("")
    link = tmp_path / ".kilodelta.0000000000000000.tmp"
    link.symlink_to(victim)
    strange = tmp_path / ".kilodelta.1111111111111111.tmp"
    strange.mkdir()
    (strange / "data").write_text("without a lock it may be anybody's")
    linked = tmp_path / ".kilodelta.2222222222222222.tmp"
    linked.mkdir()
    (linked / "lock").symlink_to(victim / "lock")
    assert staging.sweep(tmp_path) == []
    assert all(path.exists() for path in (*kept, plain, link, victim / "lock", strange, linked))
    half = tmp_path / ".kilodelta.3333333333333333.tmp"
    half.mkdir()  # its process died before the lock was made
    assert staging.sweep(tmp_path) == [half.name]


def test_a_stage_that_holds_links_is_removed_without_following(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o500)

    def link(stage: Path) -> None:
        (stage / "link").symlink_to(victim)
        raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        folder(tmp_path / "b", link)
    assert victim.stat().st_mode & 0o777 == 0o500
    assert sorted(os.listdir(tmp_path)) == ["victim"]


def test_a_sweep_that_meets_a_young_stage_makes_it_take_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the making of a stage and its lock, another process may take it for a dead one."""
    original, swept = os.mkdir, list[str]()

    def mkdir(path: str, mode: int = 0o777, **more: int) -> None:
        original(path, mode, **more)
        if len(swept) < 3 and str(path).endswith(".tmp"):
            swept.extend(staging.sweep(tmp_path))

    monkeypatch.setattr(os, "mkdir", mkdir)
    staging.write(tmp_path / "a", b"whole")
    assert len(swept) == 3
    assert os.listdir(tmp_path) == ["a"]


def test_scratch_is_private_and_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with staging.scratch() as place:
        (place / "model").write_text("")
        assert place.is_relative_to(tmp_path)
    beside = tmp_path / "deep"
    beside.mkdir()
    with staging.scratch(beside / "out.bin") as place:
        assert place.parents[1] == beside
    assert os.listdir(tmp_path) == ["deep"]
    assert os.listdir(beside) == []


PAIR = """
import sys, pathlib
from kilodelta.files import staging
out, text = pathlib.Path(sys.argv[1]), sys.argv[2]
for _ in range(40):
    with staging.new_file(out) as stage, stage.open("w") as file:
        for _ in range(50):
            file.write(text * 20)
            file.flush()
"""


def test_two_writers_never_mix(tmp_path: Path) -> None:
    """With the same process number each, where this machine lets us make process namespaces."""
    space = ["unshare", "--user", "--map-root-user", "--pid", "--fork"]
    if subprocess.run([*space, "true"], capture_output=True, check=False).returncode:
        space = []
    out = tmp_path / "out"
    writers = [
        subprocess.Popen([*space, sys.executable, "-c", PAIR, str(out), text]) for text in "AB"
    ]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if out.exists():
            seen.add(out.read_text())
    assert all(writer.returncode == 0 for writer in writers)
    assert seen | {out.read_text()} <= {"A" * 1000, "B" * 1000}
    assert os.listdir(tmp_path) == ["out"]


def test_an_error_inside_a_stage_names_what_the_user_will_find(tmp_path: Path) -> None:
    """A fleet's task makes results in results; its report named two private folders, then gone."""
    place = tmp_path / "merged"
    with (
        pytest.raises(OutputError) as caught,
        staging.new_folder(place) as outer,
        staging.new_folder(outer / "adapter") as inner,
        staging.new_file(inner / "a.bin"),
    ):
        raise OSError(errno.ENOSPC, "No space left")
    assert caught.value.what == f"{place}/adapter/a.bin cannot be written: No space left"
