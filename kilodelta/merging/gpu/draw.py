"""Draw the factors of an update: Triton kernels.

A low-rank factor is int32 (rank, lines), where lines are the rows or the columns of the weights;
RandLoRA's is int8 (lines, width), element rho * n + j of a line for rank rho and base j.
No basis is ever in memory. All kernels share these arguments:

- `out`: the factor, or the part of it from line `first` on;
- `k0, k1, role`: the seed's words, low first, and the bases' role;
- `first, lines, rank`: the first line, how many, and the rank;
- `ROWS`: lines are rows of the basis, else its columns;
- `TILE`: entries (or lines) that one program computes;
- `edge, top`: of the ternary basis: below `edge` an entry is -1, from `top` on +1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kilodelta.merging.gpu.philox import philox, place, popcount, sign, ternary

PLAIN = ("k0", "k1", "role", "first", "index", "total", "anchor", "edge", "top")
"""Arguments whose values cause no new compilation."""


@triton.jit(do_not_specialize=PLAIN)
def mixed(
    out, planes, flips, total, k0, k1, role, first, lines, rank, blocks, bits,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Sum sign bases: sum |q| - 2 sum |q| (bit ^ negative), each bit plane of |q| by counting bits.

    Args:
        planes: uint32 (bits, blocks, 4), as for the numba kernel.
        flips: uint32 (blocks, 4), bit i set where q_i is negative.
        total: sum |q|, below 2^31.
        blocks, bits: sizes of `planes`.
        out, k0, k1, role, first, lines, rank, ROWS, TILE: see above.
    """
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row, column = place(at % lines + first, at // lines, ROWS)
    total_set = tl.zeros((TILE,), tl.uint32)
    for b in range(blocks):
        w0, w1, w2, w3 = philox(row, column, b, role, k0, k1)
        w0 ^= tl.load(flips + 4 * b)
        w1 ^= tl.load(flips + 4 * b + 1)
        w2 ^= tl.load(flips + 4 * b + 2)
        w3 ^= tl.load(flips + 4 * b + 3)
        for p in range(bits):
            mask = planes + (p * blocks + b) * 4
            count = popcount(w0 & tl.load(mask)) + popcount(w1 & tl.load(mask + 1))
            count += popcount(w2 & tl.load(mask + 2)) + popcount(w3 & tl.load(mask + 3))
            total_set += count << p
    # Twice the count may pass 2^31; as int32 it is right modulo 2^32, and so is the difference.
    twice = (total_set << 1).to(tl.int32, bitcast=True)
    tl.store(out + at, total - twice, mask=at < lines * rank)


@triton.jit(do_not_specialize=PLAIN)
def signed(
    out, over_rank, over_lines, k0, k1, role, first, lines, rank,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Multiply sign basis 0 by a number for each rank and one for each line (VeRA).

    Args:
        over_rank: int32 (rank,).
        over_lines: int32 (all lines,).
        out, k0, k1, role, first, lines, rank, ROWS, TILE: see above.
    """
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = at < lines * rank
    row, column = place(at % lines + first, at // lines, ROWS)
    word, _, _, _ = philox(row, column, 0, role, k0, k1)
    size = tl.load(over_rank + at // lines, mask=inside, other=0)
    size *= tl.load(over_lines + at % lines + first, mask=inside, other=0)
    tl.store(out + at, size * sign(word, 0), mask=inside)


@triton.jit(do_not_specialize=PLAIN)
def picked(
    out, theta, k, anchor, k0, k1, role, anchor_role, index, first, lines, rank,
    ROWS: tl.constexpr, ANCHORED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Pick signed numbers from a vector, and add a multiple of sign basis 0 (Uni-LoRA).

    Args:
        theta: int32 (k,).
        k: its length.
        anchor: the multiple.
        anchor_role: the role of that basis.
        index: the target's position among the targets.
        ANCHORED: whether `anchor` is not zero.
        out, k0, k1, role, first, lines, rank, ROWS, TILE: see above.
    """
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = at < lines * rank
    row, column = place(at % lines + first, at // lines, ROWS)
    word, odd, _, _ = philox(row, column, index, role, k0, k1)
    # (word k) >> 32 scales a word to 0 .. k - 1 without a division.
    chosen = tl.umulhi(word, k + tl.zeros_like(word))
    value = tl.load(theta + chosen, mask=inside, other=0) * sign(odd, 0)
    if ANCHORED:
        word, _, _, _ = philox(row, column, 0, anchor_role, k0, k1)
        value += anchor * sign(word, 0)
    tl.store(out + at, value, mask=inside)


@triton.jit
def _fold(start, factor, word, bit, j, inside, edge, top, rank, n, TERNARY: tl.constexpr):
    """Store lambda times the entries of bases j."""
    entry = ternary(word, edge, top) if TERNARY else sign(word, bit)
    value = tl.load(factor + j * rank, mask=j < n, other=0).to(tl.int32)
    tl.store(start + j, (value * entry).to(tl.int8), mask=inside & (j < n))


@triton.jit(do_not_specialize=PLAIN)
def large(
    out, lambda_, k0, k1, role, first, edge, top, lines, rank, n, width,
    TERNARY: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Draw RandLoRA's large side, lambda_j[rho] B_j[line, rho], 128 bases j per program.

    Args:
        lambda_: int8 (n, rank).
        edge, top: of the ternary basis.
        n: bases.
        width: entries of a line of `out`, rank n rounded up.
        TERNARY: the basis is ternary, else of signs.
        out, k0, k1, role, first, lines, rank, TILE: see above.
    """
    line = tl.program_id(0) * TILE + tl.arange(0, TILE)
    rho, group = tl.program_id(1), tl.program_id(2)
    at = tl.arange(0, 32)[None, :]
    row = (line + first)[:, None]
    if TERNARY:  # a call serves 4 bases: 32 calls for each line
        row = row + at * 0
        w0, w1, w2, w3 = philox(row, rho + row * 0, group * 32 + at, role, k0, k1)
        j, step, each = group * 128 + 4 * at, 1, 0
    else:  # a call serves 128: one for each line, 32 bits of a word at a time
        w0, w1, w2, w3 = philox(row, rho + row * 0, group, role, k0, k1)
        j, step, each = group * 128 + at, 32, 1
    bit = at * each
    start = out + line[:, None].to(tl.int64) * width + rho * n
    inside = (line < lines)[:, None]
    factor = lambda_ + rho
    _fold(start, factor, w0, bit, j, inside, edge, top, rank, n, TERNARY)
    _fold(start, factor, w1, bit, j + step, inside, edge, top, rank, n, TERNARY)
    _fold(start, factor, w2, bit, j + 2 * step, inside, edge, top, rank, n, TERNARY)
    _fold(start, factor, w3, bit, j + 3 * step, inside, edge, top, rank, n, TERNARY)


@triton.jit(do_not_specialize=PLAIN)
def small(
    out, gamma, k0, k1, role, first, edge, top, lines, all_lines, n, width,
    TERNARY: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Draw RandLoRA's small side, A[rho, line] gamma_j[line], 32 bases j per program.

    Args:
        gamma: int8 (n, all_lines).
        edge, top: of the ternary basis.
        all_lines: lines of the whole factor.
        n: bases.
        width: entries of a line of `out`, rank n rounded up.
        TERNARY: the basis is ternary, else of signs.
        out, k0, k1, role, first, lines, TILE: see above.
    """
    line = tl.program_id(0) * TILE + tl.arange(0, TILE)
    rho = tl.program_id(1)
    j = tl.program_id(2) * 32 + tl.arange(0, 32)[None, :]
    word, _, _, _ = philox(rho + line * 0, line + first, 0, role, k0, k1)
    entry = ternary(word, edge, top) if TERNARY else sign(word, 0)
    inside = (line < lines)[:, None] & (j < n)
    value = tl.load(gamma + j * all_lines + (line + first)[:, None], mask=inside, other=0)
    start = out + line[:, None].to(tl.int64) * width + rho * n
    tl.store(start + j, (value.to(tl.int32) * entry[:, None]).to(tl.int8), mask=inside)
