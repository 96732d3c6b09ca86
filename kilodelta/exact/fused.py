"""Merge low-rank updates in one pass: product, addition and rounding of one tile after the other,
which stays in the nearest cache.

Products and sums are integers below 2^53 in float64, or below 2^24 in float32, so they are exact in
any order, and fused multiply-adds change nothing.
"""

from __future__ import annotations

import numpy as np

from kilodelta.exact.compiled import kernel
from kilodelta.exact.rounding import add_bf16, add_f16, add_f32

FEW = 32
"""The largest inner dimension for which this is faster than a product by BLAS."""

TILE = 512
"""Columns of a tile; with eight rows of the right factor it takes 36 KiB."""

SMALL = 1 << 24
"""The bound of all sums below which float32 holds every one exactly."""


def narrowest(bound: int) -> type[np.float32 | np.float64]:
    """Return the fastest type in which a product below this bound is exact."""
    return np.float32 if bound < SMALL else np.float64


@kernel(fastmath={"contract"})
def multiply_row(left, right, start, acc):  # type: ignore[no-untyped-def]
    """Compute one piece of a row of a product.

    Args:
        left: one row of the left factor, float64 or float32 (K,).
        right: of the same type (K, d).
        start: the first column.
        acc: of the same type (n,), becomes left @ right[:, start : start + n].
    """
    stop = start + acc.size
    k = 0
    if left.size >= 4:  # what needs no zeros first
        r0, r1 = right[0, start:stop], right[1, start:stop]
        r2, r3 = right[2, start:stop], right[3, start:stop]
        l0, l1, l2, l3 = left[0], left[1], left[2], left[3]
        for j in range(acc.size):
            acc[j] = l0 * r0[j] + l1 * r1[j] + l2 * r2[j] + l3 * r3[j]
        k = 4
    else:
        acc[:] = 0.0
    while k + 4 <= left.size:
        r0, r1 = right[k, start:stop], right[k + 1, start:stop]
        r2, r3 = right[k + 2, start:stop], right[k + 3, start:stop]
        l0, l1, l2, l3 = left[k], left[k + 1], left[k + 2], left[k + 3]
        for j in range(acc.size):
            acc[j] += l0 * r0[j] + l1 * r1[j] + l2 * r2[j] + l3 * r3[j]
        k += 4
    while k < left.size:
        r0, l0 = right[k, start:stop], left[k]
        for j in range(acc.size):
            acc[j] += l0 * r0[j]
        k += 1


@kernel(fastmath={"contract"})
def multiply_two_rows(left, right, start, acc):  # type: ignore[no-untyped-def]
    """Compute what `multiply_row` does for two rows at once: the right factor is read only once.

    Args:
        left: two rows of the left factor, float64 or float32 (2, K).
        right: of the same type (K, d).
        start: the first column.
        acc: of the same type (2, n), contiguous.
    """
    size, columns = acc.shape[1], slice(start, start + acc.shape[1])
    both, first, second = acc.reshape(-1), left[0], left[1]  # one array: it aliases itself
    k = 0
    if first.size >= 4:
        r0, r1, r2, r3 = right[0, columns], right[1, columns], right[2, columns], right[3, columns]
        l0, l1, l2, l3 = first[0], first[1], first[2], first[3]
        m0, m1, m2, m3 = second[0], second[1], second[2], second[3]
        for j in range(size):
            a, b, c, d = r0[j], r1[j], r2[j], r3[j]
            both[j] = l0 * a + l1 * b + l2 * c + l3 * d
            both[size + j] = m0 * a + m1 * b + m2 * c + m3 * d
        k = 4
    else:
        both[:] = 0.0
    while k + 4 <= first.size:
        r0, r1 = right[k, columns], right[k + 1, columns]
        r2, r3 = right[k + 2, columns], right[k + 3, columns]
        l0, l1, l2, l3 = first[k], first[k + 1], first[k + 2], first[k + 3]
        m0, m1, m2, m3 = second[k], second[k + 1], second[k + 2], second[k + 3]
        for j in range(size):
            a, b, c, d = r0[j], r1[j], r2[j], r3[j]
            both[j] += l0 * a + l1 * b + l2 * c + l3 * d
            both[size + j] += m0 * a + m1 * b + m2 * c + m3 * d
        k += 4
    while k < first.size:
        r0, l0, m0 = right[k, columns], first[k], second[k]
        for j in range(size):
            both[j] += l0 * r0[j]
            both[size + j] += m0 * r0[j]
        k += 1


@kernel
def merge_f32(left, right, weights, factor, scale, out):  # type: ignore[no-untyped-def]
    """Compute `out` (rows, d) = weights + 2^e C left @ right; return whether any is not finite.

    Args:
        left: float64 or float32 (rows, K), integers.
        right: of the same type (K, d), integers, contiguous.
        weights: float32 (rows, d).
        factor: C, float64.
        scale: 2^e, float32.
        out: float32 (rows, d).
    """
    bad, buffer = np.uint32(0), np.empty(TILE, right.dtype)
    for start in range(0, right.shape[1], TILE):
        stop = min(right.shape[1], start + TILE)
        acc = buffer[: stop - start]
        for i in range(left.shape[0]):
            multiply_row(left[i], right, start, acc)
            bad |= add_f32(weights[i, start:stop], acc, factor, scale, out[i, start:stop])
    return bad


@kernel
def merge_bf16(left, right, weights, factor, scale, out):  # type: ignore[no-untyped-def]
    """Compute what `merge_f32` computes, for bfloat16 as uint16.

    Args:
        left: float64 or float32 (rows, K), integers.
        right: of the same type (K, d), integers, contiguous.
        weights: bfloat16 bits, uint16 (rows, d).
        factor: C, float64.
        scale: 2^e, float32.
        out: uint16 (rows, d).
    """
    bad, buffer = np.uint32(0), np.empty(TILE, right.dtype)
    for start in range(0, right.shape[1], TILE):
        stop = min(right.shape[1], start + TILE)
        acc = buffer[: stop - start]
        for i in range(left.shape[0]):
            multiply_row(left[i], right, start, acc)
            bad |= add_bf16(weights[i, start:stop], acc, factor, scale, out[i, start:stop])
    return bad


@kernel
def merge_f16(left, right, weights, factor, scale, out):  # type: ignore[no-untyped-def]
    """Compute what `merge_f32` computes, for float16 as uint16.

    Args:
        left: float64 or float32 (rows, K), integers.
        right: of the same type (K, d), integers, contiguous.
        weights: float16 bits, uint16 (rows, d).
        factor: C, float64.
        scale: 2^e, float32.
        out: uint16 (rows, d).
    """
    bad, buffer = np.uint32(0), np.empty(TILE, right.dtype)
    for start in range(0, right.shape[1], TILE):
        stop = min(right.shape[1], start + TILE)
        acc = buffer[: stop - start]
        for i in range(left.shape[0]):
            multiply_row(left[i], right, start, acc)
            bad |= add_f16(weights[i, start:stop], acc, factor, scale, out[i, start:stop])
    return bad


MERGE = {"F32": merge_f32, "F16": merge_f16, "BF16": merge_bf16}
"""Kernels by safetensors dtype."""
