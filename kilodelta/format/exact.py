"""Exact products of integer matrices, by the fastest unit that provably makes no error.

- few columns: float64 multiply-adds in numba (every partial sum stays below 2^53 by the format's
  own bound);
- int8 factors: `torch._int_mm` with int32 sums, where torch is installed and its self-test with
  extreme values passes (it saturates silently on x86 without VNNI); else float32 products split
  so that every sum of absolute products stays below 2^24;
- the rest: float64 products by BLAS.

This is the one module of the ground floor that uses torch, and only where it is there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

Matrix = npt.NDArray[Any]

FEW = 32
"""Inner dimension up to which the numba kernel is the fastest."""

_BLAS = Lock()  # BLAS and torch use all cores themselves; merging threads take turns


@njit(nogil=True, cache=True)
def _low_rank(left, right, out):  # type: ignore[no-untyped-def]
    """`out` float64 (rows, d) = left float64 (rows, K) @ right float64 (K, d)."""
    rank, d = right.shape
    tile = 512
    for start in range(0, d, tile):
        n = min(tile, d - start)
        for i in range(left.shape[0]):
            acc = out[i, start : start + n]
            acc[:] = 0.0
            k = 0
            while k + 4 <= rank:
                r0, r1 = right[k, start : start + n], right[k + 1, start : start + n]
                r2, r3 = right[k + 2, start : start + n], right[k + 3, start : start + n]
                l0, l1, l2, l3 = left[i, k], left[i, k + 1], left[i, k + 2], left[i, k + 3]
                for j in range(n):
                    acc[j] += l0 * r0[j] + l1 * r1[j] + l2 * r2[j] + l3 * r3[j]
                k += 4
            while k < rank:
                r0, l0 = right[k, start : start + n], left[i, k]
                for j in range(n):
                    acc[j] += l0 * r0[j]
                k += 1


def product(left: Matrix, right: Matrix) -> Matrix:
    """left (D, K) @ right (K, d), exact, as float64 or int32 (D, d).

    The caller vouches that every sum of absolute products stays below 2^53.
    """
    if left.shape[1] <= FEW:
        out = np.empty((left.shape[0], right.shape[1]), np.float64)
        _low_rank(_float64(left), _float64(right), out)
        return out
    with _BLAS:
        if left.dtype == np.int8 and right.dtype == np.int8:
            return int8_product(left, right)
        found: Matrix = _float64(left) @ _float64(right)
        found += 0.0  # BLAS may leave -0.0, which would keep a weight of -0.0 from becoming +0.0
        return found


def _float64(matrix: Matrix) -> Matrix:
    return np.ascontiguousarray(matrix, dtype=np.float64)


def int8_product(left: Matrix, right: Matrix) -> Matrix:
    """The product of int8 matrices as int32 (D, d), inner dimension below 2^17."""
    return _int8_unit()(left, right)


@lru_cache(maxsize=1)
def _int8_unit() -> Callable[[Matrix, Matrix], Matrix]:
    if importlib.util.find_spec("torch") is not None and passes_self_test(by_torch):
        return by_torch
    return by_float32


def by_torch(left: Matrix, right: Matrix) -> Matrix:
    """By `torch._int_mm`: VNNI or AMX on x86, its own kernels elsewhere."""
    import torch

    found = torch._int_mm(torch.from_numpy(left), torch.from_numpy(right))
    return np.asarray(found.numpy())


def by_float32(left: Matrix, right: Matrix) -> Matrix:
    """By float32 BLAS, the inner dimension cut so that no sum can reach 2^24."""
    largest = _peak(left) * _peak(right)
    step = max(1, (2**24 - 1) // max(1, largest))
    total: Matrix = np.zeros((left.shape[0], right.shape[1]), np.int32)
    for k in range(0, left.shape[1], step):
        part = left[:, k : k + step].astype(np.float32) @ right[k : k + step].astype(np.float32)
        total += part.astype(np.int32)
    return total


def _peak(matrix: Matrix) -> int:
    return max(int(matrix.max(initial=0)), -int(matrix.min(initial=0)))


def passes_self_test(unit: Callable[[Matrix, Matrix], Matrix]) -> bool:
    """Whether a unit gets products of extreme int8 values right, at sizes that do not divide."""
    rng = np.random.default_rng(20100257)
    for rows, inner, columns in ((33, 64, 48), (40, 200, 24), (17, 130, 9), (64, 1040, 64)):
        left = rng.choice(np.array([-127, -64, 65, 127], np.int8), (rows, inner))
        right = rng.choice(np.array([-127, -1, 65, 127], np.int8), (inner, columns))
        left[0], right[:, 0] = 127, 127
        left[1], right[:, 1] = -127, 127
        try:
            found = unit(left, right)
        except RuntimeError:  # this build lacks the operation
            return False
        if not np.array_equal(found, left.astype(np.int64) @ right.astype(np.int64)):
            return False
    return True
