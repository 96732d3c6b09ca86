"""Exact products of integer matrices, by the fastest unit that provably makes no error.

- int8 factors: `torch._int_mm` with int32 sums, where torch is installed and its self-test with
  extreme values passes (it saturates silently on x86 without VNNI); else float32 products split
  so that every sum of absolute products stays below 2^24;
- the rest: float64 products by BLAS; every partial sum stays below 2^53 by the format's own bound.

Products with a small inner dimension never come here: `kilodelta.format.fused` merges them at once.

This is the one module of the ground floor that uses torch, and only where it is there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[Any]

SPAN = 512
"""Columns that the float32 product takes or leaves together."""

_BLAS = Lock()  # BLAS and torch use all cores themselves; merging threads take turns


def product(left: Matrix, right: Matrix) -> Matrix:
    """left (D, K) @ right (K, d), exact, as float64 or int32 (D, d).

    The caller vouches that every sum of absolute products stays below 2^53.
    """
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
    try:
        return by_torch if passes_self_test(by_torch) else by_float32
    except ImportError:  # torch is not there, or does not load
        return by_float32


def by_torch(left: Matrix, right: Matrix) -> Matrix:
    """By `torch._int_mm`: VNNI or AMX on x86, its own kernels elsewhere."""
    import torch

    found = torch._int_mm(torch.from_numpy(_plain(left)), torch.from_numpy(_plain(right)))
    return np.asarray(found.numpy())


def _plain(matrix: Matrix) -> Matrix:
    """As torch wants it: writable (it warns of a mapped file's), and with the strides that its
    shape implies. numpy lets the stride of a dimension of length 1 be anything, and `_int_mm`
    would take it for the length of a row."""
    return np.require(matrix, requirements=["C", "W"]).reshape(-1).reshape(matrix.shape)


def by_float32(left: Matrix, right: Matrix) -> Matrix:
    """By float32 BLAS, the inner dimension cut so that no sum can reach 2^24."""
    total: Matrix = np.zeros((left.shape[0], right.shape[1]), np.int32)
    for span in float32_spans(left, right):
        part = left[:, span].astype(np.float32) @ right[span].astype(np.float32)
        total += part.astype(np.int32)
    return total


def float32_spans(left: Matrix, right: Matrix) -> list[slice]:
    """Runs of the inner dimension whose sums of absolute products stay below 2^24."""
    spans, start = [], 0
    reach = np.zeros(right.shape[1], np.float32)
    for k in range(0, right.shape[0], SPAN):
        added = _reach(left[:, k : k + SPAN], right[k : k + SPAN])
        if float((reach + added).max()) >= 2**24:
            spans.append(slice(start, k))
            start, reach = k, added
        else:
            reach = reach + added
    return [*spans, slice(start, right.shape[0])]


def _reach(left: Matrix, right: Matrix) -> Matrix:
    """What each column's sum can reach, float32; exact, because SPAN * 128^2 is below 2^24."""
    peaks = np.maximum(left.max(axis=0).astype(np.float32), -left.min(axis=0).astype(np.float32))
    found: Matrix = peaks @ np.abs(right.astype(np.float32))
    return found


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
