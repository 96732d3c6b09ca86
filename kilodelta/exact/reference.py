"""The format in plain Python: slow, without kernels, for reading and for checking everything else.

It shares no arithmetic with the fast path: Python integers, scalar loops in the order of the
papers' formulas, and one numpy float32 at a time for the rounding (docs/format.md, 5 and 6).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil, ldexp, prod
from typing import Any

import numpy as np

MASK = 0xFFFFFFFF
Matrix = list[list[int]]
Entry = Callable[[int, int, int, int], int]
"""(role, base, row, column) to a basis entry."""


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al., SC'11): four 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def words(seed: int, row: int, column: int, block: int, role: int) -> tuple[int, int, int, int]:
    """The four words at a coordinate."""
    return philox((row, column, block, role), (seed & MASK, seed >> 32))


def sign(seed: int) -> Entry:
    """Sign bases: bit i mod 128 of block i div 128, 0 is +1 and 1 is -1."""

    def entry(role: int, base: int, row: int, column: int) -> int:
        word = words(seed, row, column, base // 128, role)[base % 128 // 32]
        return 1 - 2 * (word >> (base % 32) & 1)

    return entry


def ternary(seed: int, sparsity: int) -> Entry:
    """Ternary bases: one entry in `sparsity` is not zero."""
    edge = 2**32 // (2 * sparsity)

    def entry(role: int, base: int, row: int, column: int) -> int:
        word = words(seed, row, column, base // 4, role)[base % 4]
        return -1 if word < edge else int(word >= 2**32 - edge)

    return entry


def update(
    options: Mapping[str, Any],
    seed: int,
    q: Mapping[str, Any],
    shape: tuple[int, int],
    index: int = 0,
) -> Matrix:
    """dQ of one target as nested lists (out, in).

    Args:
        options: the method as the manifest writes it.
        q: nested lists of integers by group name, each in its group's shape.
        shape: (out, in).
        index: the target's position among the targets (Uni-LoRA).
    """
    return _UPDATES[options["name"]](options, seed, q, shape, index)


def _each(shape: tuple[int, int], element: Callable[[int, int], int]) -> Matrix:
    return [[element(o, i) for i in range(shape[1])] for o in range(shape[0])]


def _nola(
    options: Mapping[str, Any], seed: int, q: Mapping[str, Any], shape: tuple[int, int], index: int
) -> Matrix:
    entry, ranks, k = sign(seed), range(options["rank"]), range(options["bases"])
    A = [
        [sum(q["alpha"][i] * entry(0, i, p, x) for i in k) for x in range(shape[1])] for p in ranks
    ]
    B = [[sum(q["beta"][j] * entry(1, j, y, p) for j in k) for p in ranks] for y in range(shape[0])]
    return _each(shape, lambda y, x: sum(B[y][p] * A[p][x] for p in ranks))


def _randlora(
    options: Mapping[str, Any], seed: int, q: Mapping[str, Any], shape: tuple[int, int], index: int
) -> Matrix:
    sparse = options["basis"] == "ternary"
    entry = ternary(seed, options["sparsity"]) if sparse else sign(seed)
    ranks, n = range(options["rank"]), range(ceil(min(shape) / options["rank"]))
    lambda_, gamma = q["lambda"], q["gamma"]

    def element(large: int, small: int) -> int:
        return sum(
            entry(3, j, large, p) * lambda_[j][p] * entry(2, 0, p, small) * gamma[j][small]
            for j in n
            for p in ranks
        )

    if shape[0] < shape[1]:
        return _each(shape, lambda y, x: element(x, y))
    return _each(shape, element)


def _lora(
    options: Mapping[str, Any], seed: int, q: Mapping[str, Any], shape: tuple[int, int], index: int
) -> Matrix:
    return _each(
        shape, lambda y, x: sum(q["B"][y][p] * q["A"][p][x] for p in range(options["rank"]))
    )


def _vera(
    options: Mapping[str, Any], seed: int, q: Mapping[str, Any], shape: tuple[int, int], index: int
) -> Matrix:
    entry, ranks = sign(seed), range(options["rank"])
    return _each(
        shape,
        lambda y, x: (
            q["b"][y] * sum(entry(5, 0, y, p) * q["lambda"][p] * entry(4, 0, p, x) for p in ranks)
        ),
    )


def _unilora(
    options: Mapping[str, Any], seed: int, q: Mapping[str, Any], shape: tuple[int, int], index: int
) -> Matrix:
    entry, ranks, theta = sign(seed), range(options["rank"]), q["theta"]

    def pick(role: int, row: int, column: int) -> int:
        w0, w1, _, _ = words(seed, row, column, index, role)
        return int(theta[w0 * len(theta) >> 32]) * (-1 if w1 & 1 else 1)

    def right(p: int, x: int) -> int:
        return int(options["anchor"]) * entry(6, 0, p, x) + pick(7, p, x)

    return _each(shape, lambda y, x: sum(pick(8, y, p) * right(p, x) for p in ranks))


_UPDATES: dict[str, Callable[..., Matrix]] = {
    "nola": _nola,
    "randlora": _randlora,
    "lora": _lora,
    "vera": _vera,
    "unilora": _unilora,
}


def round_to(dtype: str, value: np.float32) -> int:
    """A float32 as the bits of F32, F16 or BF16, to nearest even."""
    if dtype == "F32":
        return int(value.view(np.uint32))
    if dtype == "F16":
        return int(value.astype(np.float16).view(np.uint16))
    bits = int(value.view(np.uint32))
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def widen(dtype: str, bits: int) -> np.float32:
    """The bits of F32, F16 or BF16 as a float32."""
    if dtype == "F32":
        return np.uint32(bits).view(np.float32)
    if dtype == "F16":
        return np.float32(np.uint16(bits).view(np.float16))
    return np.uint32(bits << 16).view(np.float32)


def merge_element(dtype: str, bits: int, c: int, e: int, dq: int) -> int:
    """One weight's bits after the update: y = float32(W) + 2^e float32(C dQ), rounded once more."""
    step = np.float32(ldexp(float(np.float32(c * dq)), e))
    return round_to(dtype, np.float32(widen(dtype, bits) + step))


def merge(
    dtype: str, weights: bytes, shape: tuple[int, ...], transposed: bool, c: int, e: int, dq: Matrix
) -> bytes:
    """A whole tensor's bytes after the update dQ (out, in); `transposed` is stored (in, out)."""
    size = 4 if dtype == "F32" else 2
    rows, columns = shape[0], prod(shape[1:])
    found = bytearray()
    for r in range(rows):
        for s in range(columns):
            at = (r * columns + s) * size
            bits = int.from_bytes(weights[at : at + size], "little")
            change = dq[s][r] if transposed else dq[r][s]
            found += merge_element(dtype, bits, c, e, change).to_bytes(size, "little")
    return bytes(found)
