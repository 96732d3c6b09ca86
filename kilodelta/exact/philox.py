"""Draw Philox4x32-10 at coordinates, and make bases of its bits: numba kernels.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11. The counter is
(row, column, block, role), the key the 64-bit seed (docs/format.md, section 5). The kernels run
without the interpreter's lock and equal `kilodelta.exact.reference` bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from kilodelta.exact.compiled import kernel

TILE = 1024
"""Elements that one pass keeps in the nearest cache: words, coordinates and sums take 28 KiB."""

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_32 = np.uint64(32)


@intrinsic  # type: ignore[untyped-decorator]
def popcount(typing_context: Any, word: Any) -> Any:
    """Count the set bits of a uint32: one instruction, which numba has no name for."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint32(types.uint32), build


@kernel
def _round(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    p0 = _M0 * np.uint64(c0)
    p1 = _M1 * np.uint64(c2)
    high0 = np.uint32(np.uint32(p0 >> _32) ^ c3 ^ k1)
    high1 = np.uint32(np.uint32(p1 >> _32) ^ c1 ^ k0)
    return high1, np.uint32(p1), high0, np.uint32(p0)


@kernel
def _bump(k0, k1, i):  # type: ignore[no-untyped-def]
    return np.uint32(k0 + np.uint32(i) * _W0), np.uint32(k1 + np.uint32(i) * _W1)


@kernel
def _schedule(k0, k1):  # type: ignore[no-untyped-def]
    """Return the keys of the ten rounds, once for many calls."""
    return (
        _bump(k0, k1, 0) + _bump(k0, k1, 1) + _bump(k0, k1, 2) + _bump(k0, k1, 3)
        + _bump(k0, k1, 4) + _bump(k0, k1, 5) + _bump(k0, k1, 6) + _bump(k0, k1, 7)
        + _bump(k0, k1, 8) + _bump(k0, k1, 9)
    )  # fmt: skip


@kernel
def _philox(a, b, c, d, keys):  # type: ignore[no-untyped-def]
    # Written out, because a loop in here keeps the loop over columns from being vectorised.
    a, b, c, d = _round(a, b, c, d, keys[0], keys[1])
    a, b, c, d = _round(a, b, c, d, keys[2], keys[3])
    a, b, c, d = _round(a, b, c, d, keys[4], keys[5])
    a, b, c, d = _round(a, b, c, d, keys[6], keys[7])
    a, b, c, d = _round(a, b, c, d, keys[8], keys[9])
    a, b, c, d = _round(a, b, c, d, keys[10], keys[11])
    a, b, c, d = _round(a, b, c, d, keys[12], keys[13])
    a, b, c, d = _round(a, b, c, d, keys[14], keys[15])
    a, b, c, d = _round(a, b, c, d, keys[16], keys[17])
    return _round(a, b, c, d, keys[18], keys[19])


@kernel
def _fill(w0, w1, w2, w3, ys, xs, block, role, keys):  # type: ignore[no-untyped-def]
    """Write the four words at (ys[j], xs[j], block, role) into four lines, uint32 (n,)."""
    for j in range(w0.size):
        a, b, c, d = _philox(ys[j], xs[j], block, role, keys)
        w0[j] = a
        w1[j] = b
        w2[j] = c
        w3[j] = d


@kernel
def _place(start, row, column, columns, ys, xs):  # type: ignore[no-untyped-def]
    """Write the coordinates of consecutive elements, row-major, from element `start` on."""
    for j in range(ys.size):
        y, x = divmod(start + j, columns)
        ys[j] = np.uint32(row + y)
        xs[j] = np.uint32(column + x)


@kernel
def draw(k0, k1, role, row, column, block, out):  # type: ignore[no-untyped-def]
    """Draw a box of words from (row, column, block) on.

    Args:
        k0, k1: the seed's low and high word, uint32.
        role: of the bases, the counter's last word.
        row, column: the first coordinate, the counter's first two words.
        block: the first block, the counter's third word.
        out: uint32 (rows, columns, blocks, 4).
    """
    rows, columns, blocks, _ = out.shape
    keys = _schedule(k0, k1)
    for i in range(rows):
        for j in range(columns):
            for b in range(blocks):
                w = _philox(
                    np.uint32(row + i), np.uint32(column + j), np.uint32(block + b), role, keys
                )
                for u in range(4):
                    out[i, j, b, u] = w[u]


@kernel
def mix(k0, k1, role, row, column, planes, flips, totals, out):  # type: ignore[no-untyped-def]
    """Compute many sums over the same sign bases: `out` int64 (n, rows, columns) of
    sum_i q_i S_i, S_i[row + ., column + .].

    With q_i = sign_i |q_i| and the basis bit b_i, the sum is sum |q_i| - 2 sum |q_i| (b_i ^ neg_i):
    for each bit plane p of the magnitudes 2^p times a population count.

    Args:
        k0, k1: the seed's low and high word, uint32.
        role: of the bases, the counter's last word.
        row, column: the first coordinate, the counter's first two words.
        planes: uint32 (n, P, blocks, 4), bit i of a block set where |q_i| has bit p.
        flips: uint32 (n, blocks, 4), bit i set where q_i is negative.
        totals: int64 (n,), sum |q_i|, below 2^32.
        out: int64 (n, rows, columns).
    """
    keys = _schedule(k0, k1)
    flat = out.reshape(out.shape[0], -1)
    words = np.empty((6, TILE), np.uint32)
    sums = np.empty((out.shape[0], TILE), np.uint32)
    for start in range(0, flat.shape[1], TILE):
        n = min(TILE, flat.shape[1] - start)
        w0, w1, w2, w3 = words[0][:n], words[1][:n], words[2][:n], words[3][:n]
        ys, xs = words[4][:n], words[5][:n]
        _place(start, row, column, out.shape[2], ys, xs)
        sums[:] = 0
        for b in range(flips.shape[1]):
            _fill(w0, w1, w2, w3, ys, xs, np.uint32(b), role, keys)
            for t in range(out.shape[0]):
                for p in range(planes.shape[1]):
                    _count(w0, w1, w2, w3, planes[t, p, b], flips[t, b], np.uint32(p), sums[t][:n])
        for t in range(out.shape[0]):
            acc, line = sums[t][:n], flat[t][start : start + n]
            for j in range(n):
                line[j] = totals[t] - 2 * np.int64(acc[j])  # twice a uint32 may pass 2^32


@kernel
def _count(w0, w1, w2, w3, mask, flip, shift, acc):  # type: ignore[no-untyped-def]
    """Add 2^shift popcount((w[j] ^ flip) & mask), over the four words of a call, to acc[j]."""
    m0, m1, m2, m3 = mask[0], mask[1], mask[2], mask[3]
    f0, f1, f2, f3 = flip[0], flip[1], flip[2], flip[3]
    for j in range(acc.size):
        count = np.uint32(
            popcount(np.uint32((w0[j] ^ f0) & m0))
            + popcount(np.uint32((w1[j] ^ f1) & m1))
            + popcount(np.uint32((w2[j] ^ f2) & m2))
            + popcount(np.uint32((w3[j] ^ f3) & m3))
        )
        # That it is below 32 keeps the shift from being widened to 64 bits.
        acc[j] = np.uint32(acc[j] + np.uint32(count << (shift & np.uint32(31))))


@kernel
def signs(k0, k1, role, row, column, values, out):  # type: ignore[no-untyped-def]
    """Compute values[j, column + .] S_j[row + ., .] for sign bases S_j.

    Args:
        k0, k1: the seed's low and high word, uint32.
        role: of the bases, the counter's last word.
        row, column: the first coordinate, the counter's first two words.
        values: signed integers (n, all columns).
        out: (rows, columns, n), of the same type, which holds -value as well.
    """
    rows, columns, n = out.shape
    keys = _schedule(k0, k1)
    for i in range(rows):
        for c in range(columns):
            line = out[i, c]
            for b in range((n + 127) // 128):
                w = _philox(np.uint32(row + i), np.uint32(column + c), np.uint32(b), role, keys)
                for u in range(4):
                    first = 128 * b + 32 * u
                    word = w[u]
                    for t in range(min(32, n - first)):
                        value = values[first + t, column + c]
                        line[first + t] = -value if (word >> np.uint32(t)) & np.uint32(1) else value


@kernel
def ternary(k0, k1, role, row, column, sparsity, values, out):  # type: ignore[no-untyped-def]
    """Do the same for ternary bases: words below floor(2^32 / 2s) are -1, as many on top +1.

    Args:
        k0, k1: the seed's low and high word, uint32.
        role: of the bases, the counter's last word.
        row, column: the first coordinate, the counter's first two words.
        sparsity: s; one entry in s is not zero.
        values: signed integers (n, all columns).
        out: (rows, columns, n), of the same type.
    """
    rows, columns, n = out.shape
    keys = _schedule(k0, k1)
    edge = np.uint64((np.uint64(1) << _32) // np.uint64(2 * sparsity))
    top = np.uint64((np.uint64(1) << _32) - edge)
    for i in range(rows):
        for c in range(columns):
            line = out[i, c]
            for b in range((n + 3) // 4):
                w = _philox(np.uint32(row + i), np.uint32(column + c), np.uint32(b), role, keys)
                for u in range(min(4, n - 4 * b)):
                    word = np.uint64(w[u])
                    value = values[4 * b + u, column + c]
                    sign = np.int64(word >= top) - np.int64(word < edge)
                    line[4 * b + u] = value * sign


@kernel
def pick(k0, k1, role, row, column, block, theta, out):  # type: ignore[no-untyped-def]
    """Draw signed picks: theta[(w0 k) >> 32], negated where w1 is odd.

    Args:
        k0, k1: the seed's low and high word, uint32.
        role: of the bases, the counter's last word.
        row, column: the first coordinate, the counter's first two words.
        block: the counter's third word: the target's index.
        theta: signed integers (k,).
        out: (rows, columns), of the same type.
    """
    rows, columns = out.shape
    keys = _schedule(k0, k1)
    k = np.uint64(theta.size)
    for i in range(rows):
        for c in range(columns):
            w = _philox(np.uint32(row + i), np.uint32(column + c), np.uint32(block), role, keys)
            value = theta[np.int64((np.uint64(w[0]) * k) >> _32)]
            out[i, c] = -value if w[1] & np.uint32(1) else value
