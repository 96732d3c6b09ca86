"""Open regular files only, without waiting, and never through a link that a stranger made.

A link in a folder that somebody else filled could lead to the user's other files, a pipe makes a
reader wait for ever, and a device file never ends. The one exception is a Hugging Face cache, whose
snapshots are links into its own blobs.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from kilodelta.errors import KiloDeltaError
from kilodelta.files import system

_FLAGS = system.BINARY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)

JSON_LIMIT = 16 << 20
"""Bytes of a configuration, manifest or other description."""
INDEX_LIMIT = 64 << 20
"""Bytes of a sharded checkpoint's index."""
_PIECE = 1 << 20
"""Bytes hashed at a time."""


class NotPlainError(OSError):
    """A name leads to a link, a pipe, a device, or a file that is larger than it may be."""


def open_file(path: Path, flags: int = os.O_RDONLY, *, follow: bool = False) -> int:
    """Open a regular file and return its descriptor, which the caller closes.

    Args:
        path: the file; the folders above it are the caller's to check.
        flags: as for `os.open`.
        follow: whether `path` itself may be a link, as one that the user named may.

    Raises:
        NotPlainError: a link, a pipe, a device or a folder has this name; or, to write, a file
            that has other names besides.
        OSError: it cannot be opened.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     os.symlink("/etc/hostname", f"{folder}/name")
        ...     try:
        ...         open_file(Path(folder) / "name")
        ...     except NotPlainError as problem:
        ...         print(problem.strerror)
        is a link
    """
    # Looked at first, because opening alone has effects on some devices, and again once it is open.
    if not flags & os.O_CREAT or os.path.lexists(path):
        _require_regular(path, os.stat(path, follow_symlinks=follow), flags)
    try:
        descriptor = os.open(path, flags | _FLAGS | (0 if follow else _NO_LINK), 0o644)
    except OSError as problem:
        if problem.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):  # link, pipe, folder
            raise _not_plain(path, problem.errno) from None
        raise
    try:
        _require_regular(path, os.fstat(descriptor), flags)
    except NotPlainError:
        os.close(descriptor)
        raise
    return descriptor


def open_reader(path: Path, *, follow: bool = False) -> BinaryIO:
    """Open a regular file for reading, unbuffered.

    Raises:
        NotPlainError: as `open_file`.
        OSError: it cannot be opened.
    """
    return os.fdopen(open_file(path, follow=follow), "rb", buffering=0)


def open_model_file(path: Path) -> int:
    """Open a regular file of a model folder; one in a Hugging Face cache may link to a blob of it.

    Raises:
        NotPlainError: it is another link, or no regular file.
        OSError: it cannot be opened.
    """
    return open_file(_blob(path) or path)


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
    return _read_all(open_file(path, follow=follow), path, limit)


def read_model_file(path: Path, limit: int = JSON_LIMIT) -> bytes:
    """Read a regular file of a model folder, of at most `limit` bytes.

    Raises:
        NotPlainError: it is no regular file, a link to another place, or larger.
        OSError: it cannot be read.
    """
    return _read_all(open_model_file(path), path, limit)


def sha256(path: Path, *, follow: bool = False) -> bytes:
    """Return the SHA-256 of a regular file, 32 bytes.

    Raises:
        NotPlainError: as `open_file`.
        OSError: it cannot be read.
    """
    state = hashlib.sha256()
    with open_reader(path, follow=follow) as reader:
        while piece := reader.read(_PIECE):
            state.update(piece)
    return state.digest()


def digest(path: Path) -> str:
    """Return `sha256:<hex>` of a file that the user named, or of a folder's files and their names.

    Raises:
        NotPlainError: as `open_file`.
        OSError: it cannot be read.
    """
    if not path.is_dir():
        return f"sha256:{sha256(path, follow=True).hex()}"
    state = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        state.update(str(file.relative_to(path)).encode("utf-8", "surrogateescape"))
        state.update(b"\0" + sha256(file, follow=True))
    return f"sha256:{state.hexdigest()}"


def is_file(path: Path) -> bool:
    """Return whether a path is a regular file itself, and no link to one."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def is_model_file(path: Path) -> bool:
    """Return whether `open_model_file` would find a regular file there."""
    return is_file(_blob(path) or path)


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


@contextmanager
def explained(path: Path, error: type[KiloDeltaError]) -> Iterator[None]:
    """Turn an OSError of the block into a sentence about `path`, raised as `error`."""
    try:
        yield
    except NotPlainError as problem:
        raise error(
            f"{path} {problem.strerror}",
            fix="put the file itself there" if problem.errno != errno.EFBIG else "check the file",
        ) from None
    except OSError as problem:
        reason = os.strerror(problem.errno) if problem.errno else str(problem)
        raise error(f"{path} cannot be opened: {reason}", fix=_advice(problem)) from None


def _advice(problem: OSError) -> str:
    if problem.errno == errno.ENOENT:
        return "check the path"
    if problem.errno == errno.ELOOP:
        return "the symbolic links form a loop: give the real file"
    return "check the path and its permissions"


def _not_plain(path: Path, number: int) -> NotPlainError:
    return NotPlainError(number, kind(path), os.fspath(path))


def _require_regular(path: Path, status: os.stat_result, flags: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise _not_plain(path, errno.EINVAL)
    if flags & (os.O_WRONLY | os.O_RDWR) and status.st_nlink > 1:
        raise NotPlainError(errno.EMLINK, "has another name, a hard link", os.fspath(path))


def _read_all(descriptor: int, path: Path, limit: int) -> bytes:
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise NotPlainError(errno.EFBIG, f"has more than {limit} bytes", os.fspath(path))
    return data


def _blob(path: Path) -> Path | None:
    """Return where a link of a Hugging Face snapshot leads, if that is a blob of the same cache.

    A cache holds `snapshots/<revision>/<file>`, links to `blobs/<digest>`.
    """
    try:
        target = os.readlink(path)
    except OSError:
        return None
    folder = path.parent.resolve()
    cache = next((p.parent.parent for p in (folder, *folder.parents) if _is_snapshot(p)), None)
    led = Path(os.path.normpath(folder / target))
    return led if cache is not None and led.parent == cache / "blobs" else None


def _is_snapshot(folder: Path) -> bool:
    return folder.parent.name == "snapshots"
