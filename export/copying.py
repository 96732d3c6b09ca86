"""Bytes from file to file: by the kernel, which shares or moves them unseen, where it can."""

from __future__ import annotations

import os


def pwrite(descriptor: int, data: memoryview, position: int) -> None:
    """Write all of `data` at a position."""
    while data:
        written = os.pwrite(descriptor, data, position)
        data, position = data[written:], position + written


def copy_range(source: int, target: int, count: int, read: int, write: int) -> int:
    """Copy at most `count` bytes between open files; the bytes copied, 0 at the source's end.

    On file systems that can (Btrfs, XFS) the two files then share the blocks.
    """
    if hasattr(os, "copy_file_range"):
        try:
            copied = os.copy_file_range(source, target, count, read, write)
        except OSError:  # two file systems, or one that cannot
            copied = 0
        if copied:
            return copied
    data = os.pread(source, count, read)
    pwrite(target, memoryview(data), write)
    return len(data)
