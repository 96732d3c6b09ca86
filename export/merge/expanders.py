"""Which device merges a tensor's bytes: the CPU's kernels, or a GPU's, with the same result."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kilodelta.errors import require
from kilodelta.files.tensor import Bytes
from kilodelta.format.delta import Delta
from kilodelta.format.targets import Target

THREADS = 16
"""Tensors that go through a GPU at a time: each has 64 MiB of pinned memory, and its bytes are
written and hashed by a thread of its own."""


@dataclass(frozen=True, kw_only=True)
class Expander:
    """A way from a target's raw bytes to the merged ones, piece by piece, and how many tensors may
    go that way at a time (None: as many as there are cores)."""

    merged: Callable[[Delta, Target, Bytes], Iterator[Bytes]]
    threads: int | None = None


def expander(device: str) -> Expander:
    """The way of a device: `cpu`, `cuda` or `cuda:N`.

    Raises:
        MissingPackageError: a GPU is asked for and torch is not installed.
        InputError: there is no such device.
    """
    if device == "cpu":
        from kilodelta.merging import arithmetic  # loads the kernels

        return Expander(merged=arithmetic.merged)
    require("torch", extra="torch", why=f"merge on {device}")
    from kilodelta.merging.gpu.choose import device_named
    from kilodelta.merging.gpu.stream import merged

    found = device_named(device)
    return Expander(
        merged=lambda delta, target, base: merged(delta, target, base, found),
        threads=min(THREADS, os.cpu_count() or 1),
    )
