"""One process at a time changes a device folder.

The kernel holds the lock (flock) and drops it when its process ends, however it ends; so a killed
command never leaves a stale lock. The file's text only tells who holds it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from kilodelta.errors import LockedError, OutputError


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the lock, or fail at once.

    Raises:
        LockedError: another process holds it.
        OutputError: the folder cannot be written.
    """
    import fcntl

    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as problem:
        raise OutputError(
            f"{path} cannot be written: {problem.strerror}", fix="check the folder's permissions"
        ) from problem
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _locked(path) from None
        _sign(descriptor)
        yield
    finally:
        os.close(descriptor)


def _locked(path: Path) -> LockedError:
    holder = path.read_text(encoding="utf-8", errors="replace").strip()
    return LockedError(
        f"{path.parent} is being changed by {holder or 'another process'}",
        fix="wait until it has finished, and try again",
    )


def _sign(descriptor: int) -> None:
    """Say who holds it; a disk without room for that does no harm."""
    text = f"process {os.getpid()} since {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}\n"
    with contextlib.suppress(OSError):
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
