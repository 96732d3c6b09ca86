"""Join the memory of the process that children are forked from into huge pages.

A fork copies one entry for each page of the parent's memory, and the child's end undoes it: for
80 MB in pages of 4 KiB about 5 ms each, and half of that once they are joined. Where hundreds of
children of a tenth of a second are forked, that is the largest part of their cost beside the tasks.

Source: MADV_COLLAPSE of `madvise(2)`, since Linux 6.1. Elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

MADV_COLLAPSE = 25
_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_MAPS = Path("/proc/self/maps")


def private_ranges(maps: str, size: int) -> Iterator[tuple[int, int]]:
    """Yield the first byte and the length of each range that huge pages can hold.

    Those are whole multiples of `size`, in memory that is private, writable and of no file.

    Args:
        maps: text of `/proc/PID/maps`.
        size: bytes of a huge page.

    Example:
        >>> list(private_ranges("1ff000-a00000 rw-p 00000000 00:00 0 [heap]", 0x200000))
        [(2097152, 8388608)]
    """
    for line in maps.splitlines():
        places, rights, _, _, inode, *name = line.split(maxsplit=5)
        first, end = (int(place, 16) for place in places.split("-"))
        first, end = -(-first // size) * size, end // size * size
        if rights == "rw-p" and inode == "0" and name in ([], ["[heap]"]) and first < end:
            yield first, end - first


def join_pages() -> int:
    """Join what can be joined, and return how many ranges were; 0 where the system cannot."""
    try:
        size, maps = int(_SIZE.read_text()), _MAPS.read_text()
        madvise = ctypes.CDLL(None).madvise
    except (OSError, ValueError, AttributeError):
        return 0
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    # A range that is refused, by an older kernel or a lack of memory, stays as it was.
    return sum(madvise(*piece, MADV_COLLAPSE) == 0 for piece in private_ranges(maps, size))
