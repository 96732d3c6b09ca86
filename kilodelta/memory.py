"""Ask how much memory this process may still take: of the machine, or of its container."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

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
