"""Ask how much memory this process may still take, and give back what it no longer uses."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

UNKNOWN = 8 << 30
"""Assumed where the system does not say."""

_MEMINFO = Path("/proc/meminfo")
_GROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)
"""Limit and use of the container, by cgroup version 2 and 1."""


def available(otherwise: int = UNKNOWN) -> int:
    """Return the bytes that the machine has free, or that the container may still take.

    Args:
        otherwise: what to return where the system says neither.

    Example:
        >>> available() > 0
        True
    """
    left = stated()
    return otherwise if left is None else left


def stated() -> int | None:
    """Return what `available` does, or None where the system does not say."""
    amounts = [*_free(), *_left()]
    return max(1, min(amounts)) if amounts else None


def _free() -> Iterable[int]:
    try:
        lines = _MEMINFO.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) << 10  # in KiB


def _left() -> Iterable[int]:
    for limit, current in _GROUPS:
        try:
            yield int(limit.read_text()) - int(current.read_text())
        except (OSError, ValueError):  # no such group, or "max"
            continue


def give_back() -> None:
    """Return free memory to the system, where its C library keeps it for later (glibc).

    Tensors of up to 32 MB are cut from a heap that shrinks at its end only. After a stage of large
    ones (opening a model, a teacher's logits) the holes stay resident, and the next stage, whose
    tensors have other sizes, grows the heap further. A call takes milliseconds, so it belongs
    between stages and not into loops.

    Example:
        >>> give_back()
    """
    gc.collect()
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    """Return glibc's `malloc_trim`; None of another C library."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # TypeError: Windows
        return None
