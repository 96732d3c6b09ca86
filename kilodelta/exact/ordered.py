"""Multiply float32 matrices in one fixed order, the same on every machine.

Each element is summed over the inner index from the first to the last, in float64. The product of
two float32 numbers is exact there, so a fused multiply-add changes nothing, and each addition is
rounded as IEEE 754 says; no library's order of summation is involved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from kilodelta.exact.compiled import kernel

Matrix = npt.NDArray[Any]

TILE = 256
"""Columns of a tile."""
DEPTH = 128
"""Inner indices of a tile: with its columns 256 KiB of float64, which stay in the second cache."""


@kernel(fastmath={"contract"})
def _multiply(left, right, out):  # type: ignore[no-untyped-def]
    """Add left (D, K) @ right (K, d) to out (D, d), all float64, K ascending for every element."""
    for first in range(0, right.shape[0], DEPTH):
        last = min(right.shape[0], first + DEPTH)
        for start in range(0, right.shape[1], TILE):
            stop = min(right.shape[1], start + TILE)
            for i in range(left.shape[0]):
                _row(left[i], right, first, last, start, out[i, start:stop])


@kernel(fastmath={"contract"})
def _row(left, right, first, last, start, acc):  # type: ignore[no-untyped-def]
    stop = start + acc.size
    k = first
    while k + 4 <= last:
        r0, r1 = right[k, start:stop], right[k + 1, start:stop]
        r2, r3 = right[k + 2, start:stop], right[k + 3, start:stop]
        l0, l1, l2, l3 = left[k], left[k + 1], left[k + 2], left[k + 3]
        for j in range(acc.size):
            # The brackets are the contract: K ascends. Four terms a pass spare most loads of acc.
            acc[j] = (((acc[j] + l0 * r0[j]) + l1 * r1[j]) + l2 * r2[j]) + l3 * r3[j]
        k += 4
    while k < last:
        r0, l0 = right[k, start:stop], left[k]
        for j in range(acc.size):
            acc[j] += l0 * r0[j]
        k += 1


def multiplier(right: Matrix) -> Callable[[Matrix], Matrix]:
    """Prepare the multiplication of left factors with one right factor.

    Args:
        right: float32 (K, d).

    Returns:
        A function of left factors, float32 (rows, K), to their products, float64 (rows, d).

    Example:
        >>> multiplier(np.float32([[2], [3]]))(np.float32([[1, 10]])).tolist()
        [[32.0]]
    """
    held = np.ascontiguousarray(right, dtype=np.float64)

    def multiply(left: Matrix) -> Matrix:
        out = np.zeros((left.shape[0], held.shape[1]))
        _multiply(np.ascontiguousarray(left, dtype=np.float64), held, out)
        return out

    return multiply
