"""System calls that not every system has, and what takes their place.

Linux has them all. macOS lacks `copy_file_range` and `sched_getaffinity`, which their callers do
without. Windows lacks positional reads and writes, `flock`, owners, and descriptors of folders; the
ways here and in `staging` are tried by tests that take the calls away, not on Windows itself.
"""

from __future__ import annotations

import functools
import os
import sys
from threading import Lock
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

BINARY = getattr(os, "O_BINARY", 0)
"""Windows translates line ends in files that are opened without it."""
HAS_FOLDER_DESCRIPTORS = os.open in os.supports_dir_fd and os.scandir in os.supports_fd
"""Whether names can be opened relative to an open folder, which nobody can exchange meanwhile."""
_BEYOND = 1 << 30
"""The byte that Windows locks: far behind the text of a lock file, which stays readable."""
_seek = Lock()


def read_at(descriptor: int, count: int, position: int) -> bytes:
    """Read at most `count` bytes from a position, leaving none read at the end of the file."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, count, position)
    with _seek:  # threads share the descriptor's position
        os.lseek(descriptor, position, os.SEEK_SET)
        return os.read(descriptor, count)


def read_into(descriptor: int, view: memoryview, position: int) -> int:
    """Read from a position into memory; return how many bytes came, 0 at the end of the file."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [view], position)
    data = read_at(descriptor, len(view), position)
    view[: len(data)] = data
    return len(data)


def write_at(descriptor: int, data: memoryview, position: int) -> int:
    """Write at a position; return how many bytes were taken."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, data, position)
    with _seek:
        os.lseek(descriptor, position, os.SEEK_SET)
        return os.write(descriptor, data)


def begin_sync(descriptor: int, begin: int, count: int) -> None:
    """Ask Linux to start writing a part of a file to the disk, so that `sync` waits less for it.

    It waits for nothing and promises nothing; other systems, and errors, are left to `sync`.
    """
    function = _sync_file_range()
    if function is not None:
        function(descriptor, begin, count, _WRITE)


_WRITE = 2  # SYNC_FILE_RANGE_WRITE, from linux/fs.h


@functools.cache
def _sync_file_range() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    import ctypes  # here, because few commands write an engine

    try:
        function = ctypes.CDLL(None).sync_file_range
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file for this process, without waiting, until it is closed.

    Returns:
        False where another holds it, None where the system or the file system has no locks.
    """
    if fcntl is None:
        return _try_lock_windows(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _try_lock_windows(descriptor: int) -> bool | None:
    try:
        import msvcrt
    except ImportError:
        return None
    os.lseek(descriptor, _BEYOND, os.SEEK_SET)
    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    except OSError:
        return False
    return True


def is_own(status: os.stat_result) -> bool:
    """Return whether a file belongs to this user; true where files have no owners by number."""
    return not hasattr(os, "geteuid") or status.st_uid == os.geteuid()


def sync(path: os.PathLike[str]) -> None:
    """Push a file's or folder's content to the disk; Windows opens no folders, and needs no push.

    Raises:
        OSError: it cannot be opened or written.
    """
    if sys.platform == "win32" and os.path.isdir(path):
        return
    flags = os.O_RDWR if sys.platform == "win32" else os.O_RDONLY  # fsync asks for more there
    descriptor = os.open(path, flags | BINARY | getattr(os, "O_CLOEXEC", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
