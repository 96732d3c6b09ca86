"""Write results in full or not at all: a private stage, fsync, then one rename."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kilodelta.files import system
from kilodelta.files.staging.stage import explained, present, staged


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
    with staged(path, parents=parents) as stage:
        new = stage.content / path.name
        yield new
        with explained(path, publishing=True):
            sync(new)  # before the rename: after a power cut a name must not stand for no content
            if replace:
                os.replace(new, path)
            else:
                _name_anew(new, path)
            sync(path.parent)  # the rename itself lies in the folder


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
    with staged(main) as stage:
        yield stage.content
        with explained(main):
            for path in paths:
                sync(stage.content / path.name)
            for path in paths:
                os.replace(stage.content / path.name, path)
            sync(main.parent)


def require_free(path: Path) -> None:
    """Check that a new folder may take a path: nothing is there, or an empty folder.

    Raises:
        OutputError: the path holds something.

    Example:
        >>> require_free(Path("no-such-folder"))
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise present(path)


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
    if not replace:
        require_free(path)
    with staged(path) as stage:
        new = stage.content / path.name
        with explained(path):
            new.mkdir()
        yield new
        with explained(path, publishing=True):
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
    with staged(place) as stage:
        yield stage.content


def write(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file in full or not at all; an earlier one is replaced.

    Raises:
        OutputError: it cannot be written.
    """
    with new_file(path) as stage, explained(path), stage.open("wb") as file:
        for part in parts:
            file.write(part)


def sync(path: Path) -> None:
    """Push a file's or folder's content to the disk."""
    system.sync(path)


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
