"""Open regular files only, without waiting, and never through a link that a stranger made.

A link in a folder that somebody else filled could lead to the user's other files, a pipe makes a
reader wait for ever, and a device file never ends.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_FLAGS = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


class NotPlainError(OSError):
    """A name leads to a link, a pipe, a device, or a file that is larger than it may be."""


def open_file(path: Path, flags: int = os.O_RDONLY, *, follow: bool = False) -> int:
    """Open a regular file and return its descriptor, which the caller closes.

    Args:
        path: the file; the folders above it are the caller's to check.
        flags: as for `os.open`.
        follow: whether `path` itself may be a link, as one that the user named may.

    Raises:
        NotPlainError: a link, a pipe, a device or a folder has this name.
        OSError: it cannot be opened.
    """
    try:
        descriptor = os.open(path, flags | _FLAGS | (0 if follow else _NO_LINK), 0o644)
    except OSError as problem:
        if problem.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):  # link, pipe, folder
            raise NotPlainError(problem.errno, kind(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotPlainError(errno.EINVAL, kind(path))
    return descriptor


def read(path: Path, limit: int, *, follow: bool = False) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Args:
        path: the file.
        limit: bytes that it may have.
        follow: as for `open_file`.

    Raises:
        NotPlainError: it is no regular file, or larger.
        OSError: it cannot be read.
    """
    with os.fdopen(open_file(path, follow=follow), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise NotPlainError(errno.EFBIG, f"has more than {limit} bytes")
    return data


def is_file(path: Path) -> bool:
    """Return whether a path is a regular file itself, and no link to one."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder itself, and no link to one."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def unplain(folder: Path) -> tuple[Path, str] | None:
    """Find an entry of a folder that is no regular file; return it and what it is, or None.

    Raises:
        OSError: the folder cannot be read.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_file(follow_symlinks=False):
                return Path(entry.path), kind(Path(entry.path))
    return None


def kind(path: Path) -> str:
    """Say what a name leads to, to follow the name in a sentence."""
    try:
        mode = path.lstat().st_mode
    except OSError as problem:
        return f"cannot be read: {problem.strerror}"
    if stat.S_ISLNK(mode):
        return "is a link"
    if stat.S_ISDIR(mode):
        return "is a folder"
    if stat.S_ISFIFO(mode):
        return "is a pipe"
    return "is a regular file" if stat.S_ISREG(mode) else "is a device or a socket"
