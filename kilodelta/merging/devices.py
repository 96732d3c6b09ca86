"""Choose what merges a tensor's bytes: the CPU's kernels, or a GPU's, with the same result."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeAlias

from kilodelta.errors import require
from kilodelta.files.tensor import Bytes
from kilodelta.format.delta import Delta
from kilodelta.format.targets import Target

if TYPE_CHECKING:  # the CPU's kernels come with numba, for which reading a file need not wait
    from kilodelta.merging.cpu import ByteSource

Merge: TypeAlias = "Callable[[Delta, Target, ByteSource], Iterator[Bytes]]"
"""From a target's base bytes to the merged ones, piece by piece."""

GPU_THREADS = 16
"""Tensors that go through a GPU at a time: each has 64 MiB of pinned memory, and its bytes are
written and hashed by a separate thread."""


def merger(device: str) -> tuple[Merge, int | None]:
    """Return the merge function of `cpu`, `cuda` or `cuda:N`, and how many tensors it takes.

    Returns:
        The function, and a number of threads; None is one for each core.

    Raises:
        MissingPackageError: a GPU is asked for and torch is not installed.
        InputError: there is no such device.
    """
    if device == "cpu":
        from kilodelta.merging import cpu

        return cpu.merged, None
    require("torch", extra="torch", why=f"merge on {device}")
    from kilodelta.merging.gpu.choose import device_named
    from kilodelta.merging.gpu.stream import merged

    place = device_named(device)
    threads = min(GPU_THREADS, os.cpu_count() or 1)
    return lambda delta, target, base: merged(delta, target, base, place), threads
