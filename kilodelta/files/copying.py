"""Copy byte ranges between files with `copy_file_range` (which may share extents); fall back to
pread and pwrite.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kilodelta.errors import CheckpointError
from kilodelta.files import system

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_FICLONE = 0x40049409
"""The number of Linux' request to share a file's blocks, from `linux/fs.h`."""


def pwrite(descriptor: int, data: memoryview, position: int) -> None:
    """Write all of `data` at a position."""
    while data:
        written = system.write_at(descriptor, data, position)
        data, position = data[written:], position + written


def copy_range(source: int, target: int, count: int, read: int, write: int) -> int:
    """Copy bytes between open files; return how many, 0 at the source's end.

    On file systems that can (Btrfs, XFS) the two files then share the blocks.

    Args:
        source: a descriptor to read from.
        target: a descriptor to write to.
        count: bytes, at most.
        read: the position in `source`.
        write: the position in `target`.
    """
    if hasattr(os, "copy_file_range"):
        try:
            copied = os.copy_file_range(source, target, count, read, write)
        except OSError:  # two file systems, or one that cannot
            copied = 0
        if copied:
            return copied
    data = system.read_at(source, count, read)
    pwrite(target, memoryview(data), write)
    return len(data)


def clone(source: int, target: int) -> bool:
    """Let a new file share all blocks of another, and return whether the file system can.

    Btrfs, XFS and ZFS can (`FICLONE`); what is written to either file then is its own.

    Args:
        source: a descriptor to read from.
        target: a descriptor of an empty file.
    """
    if fcntl is None or not sys.platform.startswith("linux"):
        return False
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False
    return True


def pread(path: Path, begin: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """Read a part of a file into memory, uint8 (n,); pages of a mapping would count as ours.

    Raises:
        CheckpointError: it cannot be read, or ends too soon.
    """
    try:
        data = np.fromfile(path, np.uint8, nbytes, offset=begin)
    except OSError as problem:
        raise CheckpointError(
            f"{path} cannot be read: {problem.strerror or problem}",
            fix="check the path and its permissions",
        ) from None
    if data.size != nbytes:
        raise CheckpointError(
            f"{path} ends before byte {begin + nbytes}", fix="the file is cut: fetch it again"
        )
    return data
