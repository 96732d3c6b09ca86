"""The format's numbers in plain Python: slow, without kernels, to read and to check the rest with.

It shares no arithmetic with the fast path: Python integers, and one numpy float32 at a time for the
rounding (docs/format.md, sections 5 and 6). Each method's formula stands in its `scalar`
(`kilodelta/format/methods/*/spec.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from math import ldexp, prod

import numpy as np

MASK = 0xFFFFFFFF
Matrix = list[list[int]]
Entry = Callable[[int, int, int, int], int]
"""(role, base, row, column) to a basis entry."""


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Compute Philox4x32-10 (Salmon et al., SC'11): four 32-bit words.

    Example:
        >>> [f"{word:08x}" for word in philox((0, 0, 0, 0), (0, 0))]
        ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def words(seed: int, row: int, column: int, block: int, role: int) -> tuple[int, int, int, int]:
    """Compute the four words at a coordinate.

    Args:
        seed: 64 bits, the key: low word, high word.
        row, column, block, role: the counter's four words, in this order.
    """
    return philox((row, column, block, role), (seed & MASK, seed >> 32))


def sign(seed: int) -> Entry:
    """Make the entries of sign bases: bit i mod 128 of block i div 128, 0 is +1 and 1 is -1."""

    def entry(role: int, base: int, row: int, column: int) -> int:
        word = words(seed, row, column, base // 128, role)[base % 128 // 32]
        return 1 - 2 * (word >> (base % 32) & 1)

    return entry


def ternary(seed: int, sparsity: int) -> Entry:
    """Make the entries of ternary bases: one in `sparsity` is not zero."""
    edge = 2**32 // (2 * sparsity)

    def entry(role: int, base: int, row: int, column: int) -> int:
        word = words(seed, row, column, base // 4, role)[base % 4]
        return -1 if word < edge else int(word >= 2**32 - edge)

    return entry


def round_to(dtype: str, value: np.float32) -> int:
    """Round a float32 to the bits of F32, F16 or BF16, to nearest even."""
    if dtype == "F32":
        return int(value.view(np.uint32))
    if dtype == "F16":
        return int(value.astype(np.float16).view(np.uint16))
    bits = int(value.view(np.uint32))
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def widen(dtype: str, bits: int) -> np.float32:
    """Return the float32 that the bits of F32, F16 or BF16 stand for."""
    if dtype == "F32":
        return np.uint32(bits).view(np.float32)
    if dtype == "F16":
        return np.float32(np.uint16(bits).view(np.float16))
    return np.uint32(bits << 16).view(np.float32)


def merge_element(dtype: str, bits: int, c: int, e: int, dq: int) -> int:
    """Merge one weight: y = float32(W) + 2^e float32(C dQ), rounded once more to its type.

    Args:
        dtype: F32, F16 or BF16.
        bits: the weight's, as an unsigned integer.
        c, e: the update's scale c * 2^e.
        dq: one element of dQ.

    Returns:
        The bits of the new weight.
    """
    step = np.float32(ldexp(float(np.float32(c * dq)), e))
    return round_to(dtype, np.float32(widen(dtype, bits) + step))


def merge(
    dtype: str, weights: bytes, shape: tuple[int, ...], transposed: bool, c: int, e: int, dq: Matrix
) -> bytes:
    """Merge a whole tensor, and return its bytes.

    Args:
        dtype: F32, F16 or BF16.
        weights: the tensor's little-endian bytes.
        shape: as stored.
        transposed: whether it is stored (in, out).
        c, e: the update's scale c * 2^e.
        dq: the update, (out, in).
    """
    size = 4 if dtype == "F32" else 2
    rows, columns = shape[0], prod(shape[1:])
    merged = bytearray()
    for r in range(rows):
        for s in range(columns):
            at = (r * columns + s) * size
            bits = int.from_bytes(weights[at : at + size], "little")
            change = dq[s][r] if transposed else dq[r][s]
            merged += merge_element(dtype, bits, c, e, change).to_bytes(size, "little")
    return bytes(merged)
