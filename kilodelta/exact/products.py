"""Exact products of integer matrices, by the fastest unit that provably makes no error.

- int8 factors: `torch._int_mm` with int32 sums, where torch is installed and its self-test with
  extreme values passes (it saturates silently on x86 without VNNI); else float32 products split
  so that every sum of absolute products stays below 2^24;
- the rest: float64 products by BLAS; every partial sum stays below 2^53 by the format's own bound.

Products with a small inner dimension never come here: `kilodelta.exact.fused` merges them at once.

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
Multiply = Callable[[Matrix], Matrix]
Unit = Callable[[Matrix, int], Multiply]
"""From a right factor and the bound of all sums to the multiplication of left factors with it."""

SPAN = 512
"""Columns that the float32 product takes or leaves together."""

_BLAS = Lock()  # BLAS and torch use all cores themselves; merging threads take turns


def product(left: Matrix, right: Matrix, bound: int) -> Matrix:
    """left (D, K) @ right (K, d), exact, as float64, float32 or int32 (D, d).

    The caller vouches that every sum of absolute products is at most `bound`, which is below 2^53,
    and below 2^31 where both are int8.
    """
    return multiplier(right, bound)(left)


def multiplier(right: Matrix, bound: int) -> Multiply:
    """`product` for many left factors; int8 ones only, where `right` is int8."""
    is_small = right.dtype == np.int8
    multiply = _int8_unit()(right, bound) if is_small else by_float64(right)

    def in_turn(left: Matrix) -> Matrix:
        with _BLAS:
            return multiply(left) if left.dtype == right.dtype else by_float64(right)(left)

    return in_turn


@lru_cache(maxsize=1)
def _int8_unit() -> Unit:
    try:
        return by_torch if passes_self_test(by_torch) else by_float32
    except ImportError:  # torch is not there, or does not load
        return by_float32


def by_float64(right: Matrix) -> Multiply:
    """By float64 BLAS."""
    floats = np.ascontiguousarray(right, dtype=np.float64)

    def multiply(left: Matrix) -> Matrix:
        found: Matrix = np.ascontiguousarray(left, dtype=np.float64) @ floats
        return found

    return multiply


def by_torch(right: Matrix, bound: int) -> Multiply:
    """By `torch._int_mm`, int32: VNNI or AMX on x86, its own kernels elsewhere."""
    import torch

    held = torch.from_numpy(_plain(right))
    return lambda left: np.asarray(torch._int_mm(torch.from_numpy(_plain(left)), held).numpy())


def _plain(matrix: Matrix) -> Matrix:
    """As torch wants it: writable (it warns of a mapped file's), and with the strides that its
    shape implies. numpy lets the stride of a dimension of length 1 be anything, and `_int_mm`
    would take it for the length of a row."""
    return np.require(matrix, requirements=["C", "W"]).reshape(-1).reshape(matrix.shape)


def by_float32(right: Matrix, bound: int) -> Multiply:
    """By float32 BLAS: float32 in one product where no sum can reach 2^24, else int32 from several,
    the inner dimension cut so that none can."""
    floats = np.ascontiguousarray(right, dtype=np.float32)

    def multiply(left: Matrix) -> Matrix:
        if bound < 2**24:
            found: Matrix = left.astype(np.float32) @ floats
            return found
        total: Matrix = np.zeros((left.shape[0], right.shape[1]), np.int32)
        for span in float32_spans(left, right):
            total += (left[:, span].astype(np.float32) @ floats[span]).astype(np.int32)
        return total

    return multiply


def float32_spans(left: Matrix, right: Matrix) -> list[slice]:
    """Runs of the inner dimension whose sums of absolute products stay below 2^24."""
    peaks, spans, start = _peaks(left, 0), [], 0
    reach = np.zeros(right.shape[1], np.int64)
    for k in range(0, right.shape[0], SPAN):
        added = peaks[k : k + SPAN] @ np.abs(right[k : k + SPAN].astype(np.int64))
        if int((reach + added).max()) >= 2**24:
            spans.append(slice(start, k))
            start, reach = k, added
        else:
            reach = reach + added
    return [*spans, slice(start, right.shape[0])]


def _peaks(matrix: Matrix, axis: int) -> Matrix:
    """The largest magnitude along an axis, int64."""
    top, bottom = matrix.max(axis=axis).astype(np.int64), matrix.min(axis=axis).astype(np.int64)
    found: Matrix = np.maximum(top, -bottom)
    return found


def passes_self_test(unit: Unit) -> bool:
    """Whether a unit gets products of extreme int8 values right, at sizes that do not divide."""
    rng = np.random.default_rng(20100257)
    for rows, inner, columns in ((33, 64, 48), (40, 200, 24), (17, 130, 9), (64, 1040, 64)):
        left = rng.choice(np.array([-127, -64, 65, 127], np.int8), (rows, inner))
        right = rng.choice(np.array([-127, -1, 65, 127], np.int8), (inner, columns))
        left[0], right[:, 0] = 127, 127
        left[1], right[:, 1] = -127, 127
        try:
            found = unit(right, 127 * 127 * inner)(left)
        except RuntimeError:  # this build lacks the operation
            return False
        if not np.array_equal(found, left.astype(np.int64) @ right.astype(np.int64)):
            return False
    return True
