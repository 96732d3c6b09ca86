"""Multiply integer matrices exactly, by the fastest unit that provably makes no error.

- int8 factors: `torch._int_mm` with int32 sums, where torch is installed, its self-test with
  extreme values passes (it saturates silently on some x86) and it is faster; else float32 products,
  split so that every sum of absolute products stays below 2^24;
- all others: float64 products by BLAS; every partial sum stays below 2^53 by the format's bound.

Products with a small inner dimension never come here: `kilodelta.exact.fused` merges them at once.

This is the only module of its room that uses torch, and only where torch is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from threading import Lock
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[Any]
Multiply = Callable[[Matrix], Matrix]
Unit = Callable[[Matrix, int], Multiply]
"""From a right factor and the bound of all sums to the multiplication of left factors with it."""

SPAN = 512
"""Inner indices that the float32 product adds to a run, or cuts off, together."""

_BLAS = Lock()  # BLAS and torch use all cores themselves; merging threads take turns


def product(left: Matrix, right: Matrix, bound: int) -> Matrix:
    """Compute left (D, K) @ right (K, d) exactly, as float64, float32 or int32 (D, d).

    Args:
        left, right: integers; int8 for the fast units.
        bound: what the caller vouches that no sum of absolute products exceeds: below 2^53, and
            below 2^31 where both factors are int8.

    Example:
        >>> product(np.array([[1, 2]]), np.array([[3], [4]]), 11).tolist()
        [[11.0]]
    """
    return multiplier(right, bound)(left)


def multiplier(right: Matrix, bound: int) -> Multiply:
    """Prepare `product` for many left factors; where `right` is int8, so are they."""
    is_small = right.dtype == np.int8
    multiply = _int8_unit()(right, bound) if is_small else by_float64(right)

    def in_turn(left: Matrix) -> Matrix:
        with _BLAS:
            return multiply(left) if left.dtype == right.dtype else by_float64(right)(left)

    return in_turn


@lru_cache(maxsize=1)
def _int8_unit() -> Unit:
    """Choose the unit for int8: torch's where it is right, and faster than float32."""
    try:
        if not passes_self_test(by_torch):
            return by_float32
    except ImportError:  # torch is missing, or does not load
        return by_float32
    # Without VNNI or AMX, `_int_mm` is a plain loop: a hundred times slower on a Zen 2 core.
    return by_torch if _seconds(by_torch) <= _seconds(by_float32) else by_float32


def _seconds(unit: Unit) -> float:
    """Time a product of about 8 million multiply-adds, the better of two runs."""
    rng = np.random.default_rng(1)
    left, right = (rng.integers(-127, 128, shape, np.int8) for shape in ((64, 512), (512, 256)))
    multiply = unit(right, 127 * 127 * 512)
    runs = []
    for _ in range(2):
        start = perf_counter()
        multiply(left)
        runs.append(perf_counter() - start)
    return min(runs)


def by_float64(right: Matrix) -> Multiply:
    """Multiply by float64 BLAS."""
    floats = np.ascontiguousarray(right, dtype=np.float64)

    def multiply(left: Matrix) -> Matrix:
        result: Matrix = np.ascontiguousarray(left, dtype=np.float64) @ floats
        return result

    return multiply


def by_torch(right: Matrix, bound: int) -> Multiply:
    """Multiply by `torch._int_mm`, int32: VNNI or AMX on x86, other kernels elsewhere."""
    import torch

    held = torch.from_numpy(_plain(right))
    return lambda left: np.asarray(torch._int_mm(torch.from_numpy(_plain(left)), held).numpy())


def _plain(matrix: Matrix) -> Matrix:
    """Make a matrix writable (torch warns of a mapped file's), with the strides of its shape.

    numpy lets the stride of a dimension of length 1 be anything, and `_int_mm` would take it for
    the length of a row.
    """
    return np.require(matrix, requirements=["C", "W"]).reshape(-1).reshape(matrix.shape)


def by_float32(right: Matrix, bound: int) -> Multiply:
    """Multiply by float32 BLAS.

    The result is float32 from one product where no sum can reach 2^24, else int32 from several, the
    inner dimension cut so that none can.
    """
    floats = np.ascontiguousarray(right, dtype=np.float32)

    def multiply(left: Matrix) -> Matrix:
        if bound < 2**24:
            whole: Matrix = left.astype(np.float32) @ floats
            return whole
        total: Matrix = np.zeros((left.shape[0], right.shape[1]), np.int32)
        # Each run is an exact integer below 2^24; their total fits int32, as the caller vouches.
        for span in float32_spans(left, right):
            total += (left[:, span].astype(np.float32) @ floats[span]).astype(np.int32)
        return total

    return multiply


def float32_spans(left: Matrix, right: Matrix) -> list[slice]:
    """Cut the inner dimension into runs whose sums of absolute products stay below 2^24."""
    # One bound for all rows of the left factor: shorter runs, but the factor is read once.
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
    """Return the largest magnitude along an axis, int64."""
    top, bottom = matrix.max(axis=axis).astype(np.int64), matrix.min(axis=axis).astype(np.int64)
    largest: Matrix = np.maximum(top, -bottom)
    return largest


def passes_self_test(unit: Unit) -> bool:
    """Check a unit on products of extreme int8 values, at sizes that do not divide into tiles."""
    rng = np.random.default_rng(20100257)
    for rows, inner, columns in ((33, 64, 48), (40, 200, 24), (17, 130, 9), (64, 1040, 64)):
        left = rng.choice(np.array([-127, -64, 65, 127], np.int8), (rows, inner))
        right = rng.choice(np.array([-127, -1, 65, 127], np.int8), (inner, columns))
        # Rows and columns of one sign: the largest sums there are, where a saturating unit errs.
        left[0], right[:, 0] = 127, 127
        left[1], right[:, 1] = -127, 127
        try:
            result = unit(right, 127 * 127 * inner)(left)
        except RuntimeError:  # this build lacks the operation
            return False
        if not np.array_equal(result, left.astype(np.int64) @ right.astype(np.int64)):
            return False
    return True
