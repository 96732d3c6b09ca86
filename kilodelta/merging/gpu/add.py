"""Multiply two integer factors, add the product to weights and round, in one pass: Triton kernels.

`y = float32(W) + 2^e float32(N)`, then to the weights' type, all to nearest even
(docs/format.md, section 6). Weights travel as raw bits, int32 or int16.
"""

from __future__ import annotations

import triton
import triton.language as tl

PLAIN = ("c", "scale")


@triton.jit
def rounded(bits, number, scale, DTYPE: tl.constexpr):
    """Compute (new bits, whether not finite) of weights after an update of 2^e times an int64.

    `scale * float32(number)` is exact, so a fused multiply-add changes nothing.

    Args:
        bits: the weights', int32 for F32, else int16.
        number: C dQ, int64.
        scale: 2^e, float32.
        DTYPE: F32, F16 or BF16.
    """
    step = number.to(tl.float32) * scale
    if DTYPE == "F32":
        y = bits.to(tl.float32, bitcast=True) + step
    elif DTYPE == "F16":
        y = bits.to(tl.float16, bitcast=True).to(tl.float32) + step
    else:
        wide = bits.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        y = wide.to(tl.float32, bitcast=True) + step
    raw = y.to(tl.uint32, bitcast=True)
    bad = (raw & 0x7F800000) == 0x7F800000
    if DTYPE == "F32":
        new = raw.to(tl.int32, bitcast=True)
    elif DTYPE == "F16":
        new = y.to(tl.float16).to(tl.int16, bitcast=True)
        bad |= (new & 0x7C00) == 0x7C00
    else:
        # `bad` was taken before rounding as well: a GPU's NaN has all bits set, and adding the bias
        # wraps it around to zero.
        new = ((raw + 0x7FFF + ((raw >> 16) & 1)) >> 16).to(tl.uint16).to(tl.int16, bitcast=True)
        bad |= (new & 0x7F80) == 0x7F80
    return new, bad


@triton.jit
def _update(weights, out, flag, number, m, n, rows, columns, c, scale, DTYPE: tl.constexpr):
    """Add a tile of the product, C times, to its weights; raise the flag where not finite."""
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    at = m.to(tl.int64)[:, None] * columns + n[None, :]
    bits = tl.load(weights + at, mask=inside, other=0)
    new, bad = rounded(bits, number.to(tl.int64) * c, scale, DTYPE)
    tl.store(out + at, new, mask=inside)
    # All programs write the same 1 to one place, so their order does not matter.
    tl.store(flag + at * 0, bad.to(tl.int32), mask=inside & bad)


@triton.jit(do_not_specialize=PLAIN)
def low_rank(
    weights, out, flag, left, right, rows, columns, rank, c, scale,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Merge by the integer product of two factors, one tile of weights for each program.

    Args:
        weights, out: raw bits (rows, columns), int32 or int16.
        flag: int32 (1,), set to 1 where a new weight is not finite.
        left, right: int32 (rank, rows) and (rank, columns).
        rows, columns, rank: sizes.
        c, scale: the update is 2^e C dQ: C, int64, and 2^e, float32.
        DTYPE: F32, F16 or BF16.
        WIDE: sum in int64, for sums that may pass 2^31.
        BM, BN: rows and columns of a tile.
    """
    broad = tl.cdiv(columns, BN)  # a grid's second axis would end at 65,535
    m = tl.program_id(0) // broad * BM + tl.arange(0, BM)
    n = tl.program_id(0) % broad * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.int64 if WIDE else tl.int32)
    for k in range(rank):
        l = tl.load(left + k * rows + m, mask=m < rows, other=0)[:, None]  # noqa: E741
        r = tl.load(right + k * columns + n, mask=n < columns, other=0)[None, :]
        if WIDE:
            total += l.to(tl.int64) * r.to(tl.int64)
        else:
            total += l * r
    _update(weights, out, flag, total, m, n, rows, columns, c, scale, DTYPE)


@triton.jit(do_not_specialize=PLAIN)
def by_int8(
    weights, out, flag, left, right, rows, columns, width, c, scale,
    DTYPE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Merge by a product of int8 factors on the tensor cores; sums are int32.

    Programs go down GROUP row tiles before the next column of tiles, so that both factors stay in
    the second cache.

    Args:
        weights, out: raw bits (rows, columns), int32 or int16.
        flag: int32 (1,), set to 1 where a new weight is not finite.
        left, right: int8 (rows, width) and (columns, width).
        rows, columns: sizes.
        width: the inner dimension, a multiple of BK.
        c, scale: the update is 2^e C dQ: C, int64, and 2^e, float32.
        DTYPE: F32, F16 or BF16.
        BM, BN, BK: a tile's rows, columns and inner length.
        GROUP: row tiles that share a column of tiles.
    """
    tall, broad = tl.cdiv(rows, BM), tl.cdiv(columns, BN)
    first = tl.program_id(0) // (GROUP * broad) * GROUP
    size = min(tall - first, GROUP)
    within = tl.program_id(0) % (GROUP * broad)
    m = (first + within % size) * BM + tl.arange(0, BM)
    n = within // size * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    # Rows beyond the edge read others again instead of a mask; `_update` does not store them.
    a = left + (m % rows).to(tl.int64)[:, None] * width + k[None, :]
    b = right + (n % columns).to(tl.int64)[:, None] * width + k[None, :]
    total = tl.zeros((BM, BN), tl.int32)
    for _ in range(0, width, BK):
        total = tl.dot(tl.load(a), tl.trans(tl.load(b)), total, out_dtype=tl.int32)
        a += BK
        b += BK
    _update(weights, out, flag, total, m, n, rows, columns, c, scale, DTYPE)
