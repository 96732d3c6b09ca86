"""Ask how much memory this process holds and may still take; give back what it no longer uses."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

UNKNOWN = 8 << 30
"""Assumed where the system does not say."""

APART = 1 << 19
"""Bytes from which `mapped_apart` maps a block by itself."""

GROWN = 32 << 20
"""Bytes by which the process must have grown for `give_back` to collect garbage."""

KEPT = 256 << 20
"""Bytes that `kept` lets a thread's heap hold at most."""

_after_collection = 0
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
_TRIM_THRESHOLD = -1  # M_TRIM_THRESHOLD, which glibc sets to twice that of mmap
_HIGHEST = 32 << 20  # to which glibc raises the threshold by itself as large blocks are freed
_MEMINFO = Path("/proc/meminfo")
_STATM = Path("/proc/self/statm")
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
    amounts = [*_free(), *_left(), *_allowed()]
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


def _allowed() -> Iterable[int]:
    """What `ulimit -v` leaves: of address space, which mapped files take as well."""
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        taken = int(_STATM.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    except (ImportError, OSError, ValueError, IndexError):  # not Linux
        return
    if limit != resource.RLIM_INFINITY:
        yield limit - taken


WORDS = ("can't allocate memory", "not enough memory", "out of memory")
"""What torch's allocators, of which a CPU's raises a plain RuntimeError, and oneDNN say."""


def has_run_out(error: BaseException) -> bool:
    """Return whether an error says that a GPU or the machine ran out of memory.

    Example:
        >>> has_run_out(RuntimeError("CUDA out of memory")), has_run_out(RuntimeError("no such op"))
        (True, False)
    """
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in WORDS)


def resident() -> int:
    """Return the bytes of memory that this process holds now; 0 where the system does not say.

    Example:
        >>> resident() >= 0
        True
    """
    try:
        pages = int(_STATM.read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):  # not Linux
        return 0
    import resource

    return pages * resource.getpagesize()


def give_back() -> None:
    """Return free memory to the system, where its C library keeps it for later (glibc).

    Tensors of up to 32 MB are cut from a heap that shrinks at its end only. After a stage of large
    ones (opening a model, a teacher's logits) the holes stay resident, and the next stage, whose
    tensors have other sizes, grows the heap further. A call takes milliseconds, so it belongs
    between stages and not into loops.

    Garbage is collected first where the process has grown by 32 MB since that was done the last
    time: it takes up to a second where many libraries are loaded, whose objects are all looked
    through, and the stages of a small model leave nothing that is worth it.

    Example:
        >>> give_back()
    """
    global _after_collection
    held = resident()
    has_grown = held == 0 or held >= _after_collection + GROWN
    if has_grown:
        gc.collect()
    trim = _trim()
    if trim is not None:
        trim(0)
    if has_grown:
        _after_collection = resident()


@contextmanager
def uncollected() -> Iterator[None]:
    """Let this block of code make objects without looking through all of them for garbage.

    For the loading of a large library, which makes a hundred thousand objects and little garbage:
    the collector took a fifth of numba's time.

    Example:
        >>> with uncollected():
        ...     gc.isenabled()
        False
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def mapped_apart() -> Iterator[None]:
    """Let large blocks of memory be mapped separately in this block of code (glibc).

    A training step frees half of what it allocates while the other half waits for the backward
    pass. glibc's aligned allocation fills such holes badly, so the heap of a deep model grows well
    beyond what is in use. A block that is mapped by itself goes back
    when it is freed. Its pages are new each time, which took a fifth of a decoder's step, so this
    is for where memory is short.

    Example:
        >>> with mapped_apart():
        ...     rows = bytearray(1 << 20)
    """
    options = _options()
    is_set = options is not None and options(_MMAP_THRESHOLD, APART) == 1
    try:
        yield
    finally:
        if is_set:
            options(_MMAP_THRESHOLD, _HIGHEST)


@contextmanager
def kept() -> Iterator[None]:
    """Keep what is freed in this block of code for what is allocated in it later (glibc).

    A thread that frees arrays of some megabytes for every tensor gives them back to the system each
    time, and the pages of the next ones are cleared anew: a tenth of a merge in the grid.

    Example:
        >>> with kept():
        ...     rows = bytearray(1 << 20)
    """
    options, trim = _options(), _trim()
    is_set = options is not None and options(_MMAP_THRESHOLD, _HIGHEST) == 1
    try:
        if is_set:
            options(_TRIM_THRESHOLD, KEPT)
        yield
    finally:
        if is_set:
            options(_TRIM_THRESHOLD, 2 * _HIGHEST)
            trim(0)


@cache
def _trim() -> Any:
    """Return glibc's `malloc_trim`; None of another C library."""
    return _of_glibc("malloc_trim")


@cache
def _options() -> Any:
    """Return glibc's `mallopt`; None of another C library."""
    return None if _trim() is None else _of_glibc("mallopt")


def _of_glibc(name: str) -> Any:
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # TypeError: Windows
        return None
