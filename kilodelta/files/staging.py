"""Write results in full or not at all: a private stage, fsync, then one rename.

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

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there, so nothing is swept either
    fcntl = None  # type: ignore[assignment]

_STAGE = re.compile(r"\.kilodelta\.[0-9a-f]{16}\.tmp\Z")
_LOCK = "lock"
_CONTENT = "content"
_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})
"""What a write says that has no room; such an error names no file."""


@contextlib.contextmanager
def new_file(path: Path, *, replace: bool = True, parents: bool = False) -> Iterator[Path]:
    """Yield a private path of the same name that becomes `path` when the block ends well.

    When the block raises, nothing is left and `path` is as before. Files that the block puts
    beside the yielded path are thrown away.

    Args:
        path: the output.
        replace: replace a file that is present when the block ends.
        parents: make the folders above `path` that are missing.

    Raises:
        OutputError: the folder is missing, not writable or full; or `path` is present and may not
            be replaced. Other errors of the block, OSErrors included, pass unchanged.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with new_file(Path(folder) / "a.txt") as stage:
        ...         _ = stage.write_text("whole")
        ...     os.listdir(folder)
        ['a.txt']
    """
    with _staged(path, parents=parents) as stage:
        new = stage.content / path.name
        yield new
        with _explained(path, publishing=True):
            sync(new)
            if replace:
                os.replace(new, path)
            else:
                _name_anew(new, path)
            sync(path.parent)


@contextlib.contextmanager
def new_files(*paths: Path) -> Iterator[Path]:
    """Yield a private folder; files made in it become `paths` when the block ends well.

    Args:
        paths: all in one folder. They take their names in this order: a file that refers to others
            comes last, so that it never stands without them. Those present are replaced.

    Raises:
        OutputError: as `new_file`.
    """
    main = paths[-1]
    with _staged(main) as stage:
        yield stage.content
        with _explained(main):
            for path in paths:
                sync(stage.content / path.name)
            for path in paths:
                os.replace(stage.content / path.name, path)
            sync(main.parent)


@contextlib.contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a private folder that becomes `path` when the block ends well.

    When the block raises, nothing is left and `path` is as before.

    Args:
        path: the output. It must be absent or an empty folder.
        replace: replace a folder that holds something; the two change places in one step where
            the system can do that, and the old one is removed then.

    Raises:
        OutputError: `path` holds something and may not be replaced, or cannot be written. Other
            errors of the block, OSErrors included, pass unchanged.
    """
    if path.is_symlink() and path.is_dir():
        path = path.resolve()  # the link stays, and the folder that it leads to is replaced
    occupied = path.exists() and (not path.is_dir() or any(path.iterdir()))
    if occupied and not replace:
        raise _present(path)
    with _staged(path) as stage:
        new = stage.content / path.name
        with _explained(path):
            new.mkdir()
        yield new
        with _explained(path, publishing=True):
            _sync_tree(new)
            if replace and path.is_dir() and any(path.iterdir()):
                _exchange(new, path)
            else:
                os.rename(new, path)  # fails where `path` has come to hold something
            sync(path.parent)


@contextlib.contextmanager
def scratch(beside: Path | None = None) -> Iterator[Path]:
    """Yield a private folder that is removed when the block ends.

    Should the process be killed, the next command that stages something there removes it.

    Args:
        beside: a path in the folder to use, such as the output; the system's folder of temporary
            files by default, which may be too small for a model.

    Raises:
        OutputError: nothing can be written there.
    """
    place = Path(tempfile.gettempdir()) / "scratch" if beside is None else beside
    with _staged(place) as stage:
        yield stage.content


def write(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file in full or not at all; an earlier one is replaced.

    Raises:
        OutputError: it cannot be written.
    """
    with new_file(path) as stage, _explained(path), stage.open("wb") as file:
        for part in parts:
            file.write(part)


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
def _sweep_temporary() -> None:
    """Sweep the system's folder of temporary files once per process; a killed one may have left
    data of a model's size there, and no later command may need `scratch`."""
    sweep(Path(tempfile.gettempdir()))


def sync(path: Path) -> None:
    """Push a file's or folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """A locked private folder; outputs are made in `content`."""

    root: Path
    lock: int

    @property
    def content(self) -> Path:
        return self.root / _CONTENT


@contextlib.contextmanager
def _staged(path: Path, *, parents: bool = False) -> Iterator[_Stage]:
    """Make a stage beside `path`, and remove it in any case."""
    if path.name in {"", ".."}:
        raise OutputError(
            f"{str(path)!r} does not name a new file or folder", fix="give a name for the output"
        )
    with _explained(path):
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        _sweep_temporary()
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


def _make(folder: Path) -> _Stage:
    while True:
        root = folder / f".kilodelta.{secrets.token_hex(8)}.tmp"
        root.mkdir(mode=0o700)
        lock = -1
        try:
            lock = os.open(root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_LINK, 0o600)
            if _try_lock(lock) is not False and _is_open_file(lock, root / _LOCK):
                (root / _CONTENT).mkdir(mode=0o700)
                return _Stage(root=root, lock=lock)
        except FileNotFoundError:
            pass  # a sweep took the folder for a dead one before it was locked: take another
        except BaseException:  # a full disk: with the lock held, no sweep would remove the rest
            _remove(root)
            if lock >= 0:
                os.close(lock)
            raise
        if lock >= 0:
            os.close(lock)


def _try_lock(descriptor: int) -> bool | None:
    """Lock a file for this process; None where the file system cannot."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_open_file(descriptor: int, path: Path) -> bool:
    """Return whether a path still names the file that is open."""
    try:
        named = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(os.fstat(descriptor), named)


def _remove_if_dead(root: Path) -> bool:
    if fcntl is None:
        return False
    status = os.stat(root, follow_symlinks=False)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
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
        if _try_lock(lock) is not True or not _is_open_file(lock, root / _LOCK):
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
def _explained(path: Path, *, publishing: bool = False) -> Iterator[None]:
    """Turn the operating system's refusal of our own steps into a sentence."""
    try:
        yield
    except OSError as problem:
        if publishing and problem.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise _present(path) from problem
        raise _unwritable(path, problem) from problem


def _present(path: Path) -> OutputError:
    return OutputError(f"{path} exists already", fix="give a new name, or remove what is there")


def _unwritable(path: Path, problem: OSError) -> OutputError:
    return OutputError(
        f"{path} cannot be written: {problem.strerror or problem}",
        fix="check the folder, its permissions and the free space",
    )


def _name_anew(new: Path, path: Path) -> None:
    """Give a file its name, failing where the name is taken."""
    try:
        os.link(new, path, follow_symlinks=False)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        os.rename(new, path)


def _exchange(new: Path, path: Path) -> None:
    """Let two folders change places, so that what was at `path` lies in the stage."""
    if _exchanged(new, path):
        return
    # Two steps. Killed between them, the old folder stays under a name that no sweep removes.
    old = path.with_name(f"{path.name}.old-{secrets.token_hex(4)}")
    os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(old, path)
        raise
    os.rename(old, new)


def _exchanged(new: Path, path: Path) -> bool:
    """Try Linux' `renameat2(..., RENAME_EXCHANGE)`."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    import ctypes  # here, because few commands replace a folder

    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return bool(rename(here, os.fsencode(new), here, os.fsencode(path), exchange) == 0)


def _sync_tree(root: Path) -> None:
    for folder, _, files in os.walk(root):
        for name in files:
            place = Path(folder) / name
            if stat.S_ISREG(os.lstat(place).st_mode):
                sync(place)
        sync(Path(folder))
