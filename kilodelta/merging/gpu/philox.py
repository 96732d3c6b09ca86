"""Draw Philox4x32-10 at coordinates, and read bases from its words: Triton functions.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11. The counter is
(row, column, block, role), the key the 64-bit seed (docs/format.md, section 5).
"""

from __future__ import annotations

import triton
import triton.language as tl

_M0, _M1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
_W0, _W1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)


@triton.jit
def philox(row, column, block, role, k0, k1):
    """Compute four uint32 words for each coordinate.

    Args:
        row, column: tensors of one shape, the counter's first two words.
        block, role: scalars or tensors of that shape, its last two.
        k0, k1: the seed's words, low first; they may come as int32.
    """
    a, b = row.to(tl.uint32), column.to(tl.uint32)
    c, d = block + tl.zeros_like(a), role + tl.zeros_like(a)
    k0, k1 = k0.to(tl.uint32, bitcast=True), k1.to(tl.uint32, bitcast=True)
    for _ in tl.static_range(10):
        high0, high1 = tl.umulhi(a, _M0), tl.umulhi(c, _M1)
        low0, low1 = a * _M0, c * _M1
        a, b, c, d = high1 ^ b ^ k0, low1, high0 ^ d ^ k1, low0
        k0, k1 = k0 + _W0, k1 + _W1
    return a, b, c, d


@triton.jit
def popcount(word):
    """Count the set bits of uint32 words: an idiom of which LLVM makes one instruction."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    return (((word + (word >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def sign(word, bit):
    """Return +1 where a bit of a word is 0, -1 where it is 1, int32."""
    return 1 - 2 * ((word >> bit) & 1).to(tl.int32)


@triton.jit
def ternary(word, edge, top):
    """Return -1 below `edge`, +1 from `top` on, else 0, int32; both bounds may come as int32."""
    edge, top = edge.to(tl.uint32, bitcast=True), top.to(tl.uint32, bitcast=True)
    return (word >= top).to(tl.int32) - (word < edge).to(tl.int32)


@triton.jit
def place(line, rank, ROWS: tl.constexpr):
    """Return (row, column) of an entry: lines are rows of the basis, or its columns."""
    if ROWS:
        row, column = line, rank
    else:
        row, column = rank, line
    return row, column
