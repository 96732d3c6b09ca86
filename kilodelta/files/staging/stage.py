"""Make private folders beside an output, and tell those of dead processes from living ones'.

A stage is a folder `.kilodelta.<64 random bits>.tmp` beside the output, open to its owner only
and made with `mkdir`, which follows no link and takes over nothing. While its process lives it
holds a lock on a file inside; the kernel drops that lock however the process ends. So the next
command that stages anything in the same folder can tell the stages of dead processes from those of
living ones and removes the dead, without trusting process numbers, which repeat between containers.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kilodelta.errors import OutputError
from kilodelta.files.system import is_own, try_lock

_STAGE = re.compile(r"\.kilodelta\.[0-9a-f]{16}\.tmp\Z")
_LOCK = "lock"
_CONTENT = "content"
_INSIDE = re.compile(r"\.kilodelta\.[0-9a-f]{16}\.tmp[/\\]content[/\\]")
_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})
"""What a write says that has no room; such an error names no file."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A locked private folder; outputs are made in `content`."""

    root: Path
    lock: int

    @property
    def content(self) -> Path:
        return self.root / _CONTENT


@contextlib.contextmanager
def staged(path: Path, *, parents: bool = False) -> Iterator[Stage]:
    """Make a stage beside `path`, and remove it at the end in any case.

    Args:
        path: the output.
        parents: make the folders above it that are missing.

    Raises:
        OutputError: the folder cannot be written, or an error of the block says so of the stage.
    """
    if path.name in {"", ".."}:
        raise OutputError(
            f"{str(path)!r} does not name a new file or folder", fix="give a name for the output"
        )
    with explained(path):
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        sweep_temporary()
        stage = _make(path.parent)
    try:
        yield stage
    except OSError as problem:
        if _is_about(problem, stage.root):
            raise _unwritable(path, problem) from problem
        raise
    finally:
        _remove(stage.root)
        os.close(stage.lock)


def is_stage(path: Path) -> bool:
    """Return whether a path is a stage's folder, of a living process or a dead one."""
    return _STAGE.match(path.name) is not None and path.is_dir() and not path.is_symlink()


def sweep(folder: Path) -> list[str]:
    """Remove the stages that dead processes left in a folder; return their names.

    Stages of living processes, of other users, and everything else stay.
    """
    swept = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        names = [entry.name for entry in entries if _STAGE.match(entry.name)]
        for name in names:
            if _remove_if_dead(Path(folder) / name):
                swept.append(name)
    return swept


@functools.cache
def sweep_temporary() -> None:
    """Sweep the system's folder of temporary files, once per process.

    A killed process may have left data of a model's size there, and no later command may need
    `scratch`.
    """
    sweep(Path(tempfile.gettempdir()))


def _make(folder: Path) -> Stage:
    """Make a locked stage in a folder; try another name where a sweep was quicker."""
    while True:
        root = folder / f".kilodelta.{secrets.token_hex(8)}.tmp"
        root.mkdir(mode=0o700)
        lock = -1
        try:
            lock = os.open(root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_LINK, 0o600)
            # Between mkdir and flock a sweep may have taken the lock, or removed the folder.
            if try_lock(lock) is not False and _is_open_file(lock, root / _LOCK):
                (root / _CONTENT).mkdir(mode=0o700)
                return Stage(root=root, lock=lock)
        except FileNotFoundError:
            pass  # a sweep took the folder for a dead one before it was locked: take another
        except BaseException:  # a full disk: with the lock held, no sweep would remove the rest
            _remove(root)
            if lock >= 0:
                os.close(lock)
            raise
        if lock >= 0:
            os.close(lock)


def _is_open_file(descriptor: int, path: Path) -> bool:
    """Return whether a path still names the file that is open."""
    try:
        named = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(os.fstat(descriptor), named)


def _remove_if_dead(root: Path) -> bool:
    """Remove a stage whose process is dead; return whether it was."""
    status = os.stat(root, follow_symlinks=False)
    if not stat.S_ISDIR(status.st_mode) or not is_own(status):
        return False
    try:
        lock = os.open(root / _LOCK, os.O_RDWR | _NO_LINK)
    except FileNotFoundError:  # killed, or about to be locked: only an empty folder goes
        with contextlib.suppress(OSError):
            root.rmdir()
            return True
        return False
    except OSError:
        return False
    try:
        # A lock that is free proves the process dead; the file may have been removed meanwhile.
        if try_lock(lock) is not True or not _is_open_file(lock, root / _LOCK):
            return False
        _remove(root)
        return True
    finally:
        os.close(lock)


def _remove(root: Path) -> None:
    """Remove a stage; the lock goes last, so that nobody takes the rest for a young one."""
    with contextlib.suppress(OSError):  # the first error, not this one, says what is wrong
        for folder, names, _ in os.walk(root):
            for name in names:
                place = Path(folder) / name
                if not place.is_symlink():
                    os.chmod(place, 0o700)  # a copied folder may be read-only
        shutil.rmtree(root / _CONTENT, ignore_errors=True)
        shutil.rmtree(root, ignore_errors=True)


def _is_about(problem: OSError, root: Path) -> bool:
    """Return whether an error that the block raised says that the stage cannot be written."""
    names = [name for name in (problem.filename, problem.filename2) if name is not None]
    if not names:
        return problem.errno in _FULL
    return any(
        not isinstance(name, int) and os.fsdecode(name).startswith(str(root)) for name in names
    )


@contextlib.contextmanager
def explained(path: Path, *, publishing: bool = False) -> Iterator[None]:
    """Turn the operating system's refusal of our own steps into a sentence.

    Args:
        path: the output.
        publishing: the step gives it its name, so that a taken name is said as such.

    Raises:
        OutputError: the block raised an OSError.
    """
    try:
        yield
    except OSError as problem:
        if publishing and problem.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise present(path) from problem
        raise _unwritable(path, problem) from problem


def present(path: Path) -> OutputError:
    """Make the error of an output whose name is taken."""
    return OutputError(
        f"{_finally(path)} exists already", fix="give a new name, or remove what is there"
    )


def _unwritable(path: Path, problem: OSError) -> OutputError:
    return OutputError(
        f"{_finally(path)} cannot be written: {problem.strerror or problem}",
        fix="check the folder, its permissions and the free space",
    )


def _finally(path: Path) -> str:
    """Name what is made inside other stages as it would be called outside: those do not stay."""
    return _INSIDE.sub("", str(path))
