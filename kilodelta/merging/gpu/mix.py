"""Sum sign bases for training, and compute the gradient: Triton kernels that draw in both passes.

Nothing of size bases times factors is ever in memory. A flat factor has element line * rank + rho;
the targets lie one after the other, the smaller first (as in
`kilodelta.compress.training.packed`).

Signs are exact in TF32, so that two products on the tensor cores, one with the first 11 bits of
each number and one with the last 13, have float32's precision; float64 serves to check gradients.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kilodelta.merging.gpu.philox import philox, place, sign

PLAIN = ("k0", "k1", "role", "step")


@triton.jit
def _signs(words, TYPE: tl.constexpr):
    """Return the 32 sign bases of each word: (32, n)."""
    return sign(words[None, :], tl.arange(0, 32)[:, None]).to(TYPE)


@triton.jit
def _dot(a, b, total):
    """Compute total + a @ b in the precision of float32, or of float64."""
    if a.dtype == tl.float64:
        total = tl.dot(a, b, total, out_dtype=tl.float64)
    else:
        # TF32 keeps the upper 10 of 23 mantissa bits: the first product takes those, the second
        # the 13 below; their difference is exact in float32.
        high = (a.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        total = tl.dot(high, b, total, input_precision="tf32")
        total = tl.dot(a - high, b, total, input_precision="tf32")
    return total


@triton.jit(do_not_specialize=PLAIN)
def forward(
    out, coefficients, starts, sizes, k0, k1, role, targets, largest, rank, blocks,
    ROWS: tl.constexpr, TYPE: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Store out[starts[t] + el] = sum_i coefficients[t, i] S_i[el] for elements el < sizes[t].

    Args:
        out: the factors one after the other, (sum of sizes,).
        coefficients: (targets, 128 blocks), zero beyond the bases.
        starts, sizes: int64 (targets,): where each target's factor begins, and its entries.
        k0, k1, role: the seed's words, low first, and the bases' role.
        targets, largest, rank, blocks: sizes; `largest` is that of the largest factor.
        ROWS: lines are rows of the basis, else its columns.
        TYPE: float32 or float64.
        BT, BE: targets and elements of a tile.
    """
    element = tl.program_id(0) * BE + tl.arange(0, BE)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    valid = t < targets
    row, column = place(element // rank, element % rank, ROWS)
    lane = tl.arange(0, 32)[None, :]
    total = tl.zeros((BT, BE), TYPE)
    for b in range(blocks):
        w0, w1, w2, w3 = philox(row, column, b, role, k0, k1)
        c = coefficients + (t[:, None] * blocks + b) * 128 + lane
        mask = valid[:, None] & (lane >= 0)
        total = _dot(tl.load(c, mask=mask, other=0.0), _signs(w0, TYPE), total)
        total = _dot(tl.load(c + 32, mask=mask, other=0.0), _signs(w1, TYPE), total)
        total = _dot(tl.load(c + 64, mask=mask, other=0.0), _signs(w2, TYPE), total)
        total = _dot(tl.load(c + 96, mask=mask, other=0.0), _signs(w3, TYPE), total)
    start, size = (
        tl.load(starts + t, mask=valid, other=0),
        tl.load(sizes + t, mask=valid, other=0),
    )
    tl.store(out + start[:, None] + element[None, :], total, mask=element[None, :] < size[:, None])


@triton.jit(do_not_specialize=PLAIN)
def backward(
    out, gradient, starts, sizes, k0, k1, role, step, targets, largest, rank, blocks,
    ROWS: tl.constexpr, TYPE: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Compute a part of the coefficients' gradient, (part, targets, 128 blocks).

    It is sum_e g[t, e] S_i[e] over `step` elements. The parts are added afterwards in a fixed
    order, so that training is reproducible.

    Args:
        out: (parts, targets, 128 blocks).
        gradient: of the factors, (sum of sizes,).
        starts, sizes: int64 (targets,): where each target's factor begins, and its entries.
        k0, k1, role: the seed's words, low first, and the bases' role.
        step: elements of a part.
        targets, largest, rank, blocks: sizes; `largest` is that of the largest factor.
        ROWS: lines are rows of the basis, else its columns.
        TYPE: float32 or float64.
        BT, BE: targets and elements of a tile.
    """
    b, part = tl.program_id(0), tl.program_id(1)
    t = tl.program_id(2) * BT + tl.arange(0, BT)
    valid = t < targets
    start, size = (
        tl.load(starts + t, mask=valid, other=0),
        tl.load(sizes + t, mask=valid, other=0),
    )
    s0, s1 = tl.zeros((BT, 32), TYPE), tl.zeros((BT, 32), TYPE)
    s2, s3 = tl.zeros((BT, 32), TYPE), tl.zeros((BT, 32), TYPE)
    for begin in range(part * step, min((part + 1) * step, largest), BE):
        element = begin + tl.arange(0, BE)
        row, column = place(element // rank, element % rank, ROWS)
        w0, w1, w2, w3 = philox(row, column, b, role, k0, k1)
        mask = element[None, :] < size[:, None]
        g = tl.load(gradient + start[:, None] + element[None, :], mask=mask, other=0.0)
        s0 = _dot(g, tl.trans(_signs(w0, TYPE)), s0)
        s1 = _dot(g, tl.trans(_signs(w1, TYPE)), s1)
        s2 = _dot(g, tl.trans(_signs(w2, TYPE)), s2)
        s3 = _dot(g, tl.trans(_signs(w3, TYPE)), s3)
    at = out + ((part * targets + t)[:, None] * blocks + b) * 128 + tl.arange(0, 32)[None, :]
    stored = valid[:, None] & (tl.arange(0, 32) >= 0)[None, :]
    tl.store(at, s0, mask=stored)
    tl.store(at + 32, s1, mask=stored)
    tl.store(at + 64, s2, mask=stored)
    tl.store(at + 96, s3, mask=stored)
