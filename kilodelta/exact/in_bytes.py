"""Merge updates into rows of nibbles, in the very bytes that hold them.

A byte holds the codes of columns 2 j (its low half) and 2 j + 1. Both are computed in the lane of
that byte, from an update whose even columns lie before its odd ones (`nibbles.halves`): nothing is
moved between lanes of a vector unit, and no array has a byte per code before it is hashed.

**Integers.** A stored nibble is n = code + 8, and with q = delta / step the new one is

    clamp(nearest(n - z + q) + z) = clamp(nearest(n + q))        but for ties, as z is an integer

so no zero point is needed where x = n + q is not near a tie. It is clamped to 0 .. 15 *before* it
is rounded: that changes no result, for nearest is monotonous and 0 and 15 are integers. Where it is
not clamped, |x| < 16 and |n| <= 15, so that the bound of `exact.quotients` on its error, 2^-24 * 8
(|x| + |n|), is at most 2^-24 * 8 * 31 (`CERTAIN`). Where it is, x lies beyond that end in truth, or
by less than a half before it, and is rounded to it either way. `exact.nearest` decides the rest.

**Small floats.** Codes are split and go the way of `exact.quotients`.
"""

from __future__ import annotations

import numpy as np

from kilodelta.exact.compiled import kernel
from kilodelta.exact.fused import multiply_row
from kilodelta.exact.nearest import nearest_integer
from kilodelta.exact.nibbles import any_of, count_changed, decode_bytes, join_bytes, split_bytes
from kilodelta.exact.quotients import (
    LANES,
    LIMIT,
    ROOM,
    add_magnitudes,
    decide_floats,
    fill_ratios,
    float_tile,
)

TILE = 1024
"""Bytes of a row at a time."""
CERTAIN = np.nextafter(np.float32(0.5 - 2.0**-24 * 8 * 31), np.float32(0))
"""The distance to the nearest integer up to which a float32 result is certain."""

_MAGIC = np.float32(1.5 * 2.0**23)  # added, it rounds to an integer in the last bits of a float32
_EIGHT = 8


@kernel(error_model="numpy")
def _group_ratios(steps, scale, out):  # type: ignore[no-untyped-def]
    """Compute scale / step of each step, cut to LIMIT; 0 where the step is 0. Float64 to float32.

    Returns:
        whether a step is 0.
    """
    still = np.int32(0)
    for k in range(steps.size):
        step = steps[k]
        ratio = min(max(scale / step, -LIMIT), LIMIT)
        out[k] = ratio if step != 0.0 else 0.0
        still |= np.int32(step == 0.0)
    return still != 0


@kernel
def _repeat(values, times, out):  # type: ignore[no-untyped-def]
    """Repeat each float32, an even number of times; two are stored at once."""
    pairs, words, each = out.view(np.uint64), values.view(np.uint32), times // 2
    whole = pairs.size // each
    for k in range(whole + 1):
        bits = np.uint64(words[min(k, values.size - 1)])
        pair = bits | (bits << np.uint64(32))
        for j in range(k * each, min((k + 1) * each, pairs.size)):
            pairs[j] = pair


@kernel
def fill_byte_ratios(steps, row, scale, groups, half, start, room, out):  # type: ignore[no-untyped-def]
    """Compute `quotients.fill_ratios` for the bytes of a tile, eight at a time where it can be.

    Args:
        steps, row, scale: as there.
        groups: the group of each byte of the tile, int64 (n,).
        half: bytes of a group.
        start: the tile's first byte.
        room: float32 (n,), overwritten.
        out: float32 (n,).

    Returns:
        whether a step is 0.
    """
    size = out.size
    if half % _EIGHT or start % half or size % _EIGHT:
        return fill_ratios(steps, row, scale, groups, half, start, out)
    first, count = start // half, (size + half - 1) // half
    still = _group_ratios(steps[row, first : first + count], scale, room[:count])
    _repeat(room, half, out)
    return still


@kernel
def integer_bytes(low, high, stream, ratios, unsure, out):  # type: ignore[no-untyped-def]
    """Round a tile of bytes of integer codes, as far as the quotients are certain.

    Args:
        low, high: dQ of the low and of the high halves, (n,), integers of any type.
        stream: uint8 (n,), the old bytes.
        ratios: float32 (n,), of `fill_byte_ratios`.
        unsure: uint8 (n,), becomes 1 where one of both weights is in doubt, else 0.
        out: uint8 (n,).

    Returns:
        whether any weight is in doubt.
    """
    zero, highest, certain = np.float32(0), np.float32(15), np.float32(CERTAIN)
    for j in range(stream.size):
        byte, ratio = np.uint32(stream[j]), ratios[j]
        first = np.float32(np.int32(byte & np.uint32(15))) + np.float32(low[j]) * ratio
        second = np.float32(np.int32(byte >> np.uint32(4))) + np.float32(high[j]) * ratio
        first = min(max(first, zero), highest)
        second = min(max(second, zero), highest)
        first_sum, second_sum = np.float32(first + _MAGIC), np.float32(second + _MAGIC)
        first_off = np.float32(abs(np.float32(first - np.float32(first_sum - _MAGIC))))
        second_off = np.float32(abs(np.float32(second - np.float32(second_sum - _MAGIC))))
        unsure[j] = np.uint8(max(first_off, second_off) > certain)
        lower = first_sum.view(np.uint32) & np.uint32(15)
        upper = (second_sum.view(np.uint32) & np.uint32(15)) << np.uint32(4)
        out[j] = np.uint8(lower | upper)
    return any_of(unsure)


@kernel
def decide_integer(code, number, ratio, step, zero, factor, base):  # type: ignore[no-untyped-def]
    """Return a stored nibble's new value, in exact integers if its quotient is in doubt.

    Args:
        code: the old stored nibble, int64.
        number, ratio: as of `integer_bytes`.
        step: float64.
        zero: the zero point, int64.
        factor: C, float64.
        base: e + 1.
    """
    x = np.float32(code) + np.float32(number) * ratio
    x = min(max(x, np.float32(0)), np.float32(15))
    near = np.float32(np.float32(x + _MAGIC) - _MAGIC)
    if np.float32(abs(np.float32(x - near))) > np.float32(CERTAIN) and step != 0.0:
        whole = np.int64(np.float64(number) * factor)
        low, high, eight = np.int64(-8), np.int64(7), np.int64(8)
        return nearest_integer(whole, step, base, code - eight, zero, low, high) + eight
    return np.int64(near)


@kernel
def decide_bytes(  # type: ignore[no-untyped-def]
    low, high, stream, ratios, unsure, steps, row, groups, zeros, factor, base, out
):
    """Round again, in exact integers, what `integer_bytes` left in doubt.

    Args:
        low, high, stream, ratios, unsure, out: as `integer_bytes` took and left them.
        steps, row, groups: as of `fill_byte_ratios`.
        zeros: int16, of the shape of the steps; (0, 0) where all are zero.
        factor: C, float64.
        base: e + 1.
    """
    words = unsure[: stream.size // _EIGHT * _EIGHT].view(np.uint64)
    for k in range((stream.size + _EIGHT - 1) // _EIGHT):
        if k < words.size and words[k] == 0:  # eight bytes at once: few are in doubt
            continue
        for j in range(k * _EIGHT, min((k + 1) * _EIGHT, stream.size)):
            if unsure[j]:
                step, zero = steps[row, groups[j]], np.int64(0)
                if zeros.size:
                    zero = np.int64(zeros[row, groups[j]])
                byte, ratio = np.int64(stream[j]), ratios[j]
                lower = decide_integer(byte & 15, low[j], ratio, step, zero, factor, base)
                upper = decide_integer(byte >> 4, high[j], ratio, step, zero, factor, base)
                out[j] = np.uint8(lower | (upper << 4))


@kernel
def _round_integers(  # type: ignore[no-untyped-def]
    low, high, factor, stream, start, zeros, steps, row, room, unsure, out
):
    values, groups, half, scale, base, _ = steps
    own, ratios = groups[start : start + stream.size], room[0]
    fill_byte_ratios(values, row, scale, own, half, start, room[1], ratios)
    if integer_bytes(low, high, stream, ratios, unsure, out):
        decide_bytes(low, high, stream, ratios, unsure, values, row, own, zeros, factor, base, out)
    return count_changed(stream, out)


@kernel
def _round_floats(  # type: ignore[no-untyped-def]
    low, high, factor, stream, start, grid, steps, row, room, codes, out
):
    values, groups, half, scale, base, _ = steps
    table, highest, middles, mantissa, sign = grid
    own = groups[start : start + stream.size]
    still = fill_byte_ratios(values, row, scale, own, half, start, room[1], room[0])
    first, second, first_new, second_new = codes[0], codes[1], codes[2], codes[3]
    split_bytes(stream, first, second)
    moved, doubts = float_tile(low, first, table, highest, mantissa, sign, room, first_new)
    if doubts or still:
        moved = decide_floats(
            low, factor, first, values, row, own, base, table, middles, sign, room, first_new
        )
    more, doubts = float_tile(high, second, table, highest, mantissa, sign, room, second_new)
    if doubts or still:
        more = decide_floats(
            high, factor, second, values, row, own, base, table, middles, sign, room, second_new
        )
    join_bytes(first_new, second_new, out)
    return moved + more


@kernel
def _measure(low, high, ratios, sums):  # type: ignore[no-untyped-def]
    """Add |delta / step| of a tile to LANES sums; uses the numbers up."""
    for j in range(low.size):
        low[j] *= ratios[j]
        high[j] *= ratios[j]
    add_magnitudes(low, sums)
    add_magnitudes(high, sums)


@kernel
def _share(rows, every):  # type: ignore[no-untyped-def]
    """Return by what a sum over every so many rows is multiplied to stand for all of them."""
    return rows / ((rows + every - 1) // every)


@kernel
def _update(left, right, i, start, low, high):  # type: ignore[no-untyped-def]
    """Compute the update of a tile of row i, from its factors or as it is at hand."""
    if right.shape[0]:
        multiply_row(left[i], right, start, low)
        multiply_row(left[i], right, right.shape[1] // 2 + start, high)
    else:
        low[:] = left[i, start : start + low.size]
        second = right.shape[1] // 2 + start
        high[:] = left[i, second : second + high.size]


@kernel
def merge_integers(left, right, factor, stream, first, zeros, steps, every, out, codes):  # type: ignore[no-untyped-def]
    """Add C left @ right to rows of 4-bit integers, and round to the base's grid.

    Args:
        left: float64 or float32 (rows, K), integers.
        right: of the same type (K, in), integers, contiguous, its columns in the order of
            `nibbles.halves`; the type holds all sums of products. With K = 0, `left` is the
            product, (rows, in).
        factor: C, float64.
        stream: uint8 (rows, in / 2), a nibble is the code plus 8.
        first: which row of the weight the first one is.
        zeros: int16, of the shape of the steps; (0, 0) where all are zero.
        steps: `grid.steps.Steps` of the whole weight, its groups and width those of bytes.
        every: measure the update in every so many rows only; 1 for all.
        out: like `stream`, the new bytes.
        codes: uint8 (rows, in), becomes what `out` decodes to, in two's complement.

    Returns:
        how many codes changed, and the sum of |delta / step|, roughly.
    """
    changed, sums, width = 0, np.zeros(LANES), stream.shape[1]
    numbers, room = np.empty((2, TILE), right.dtype), np.empty((2, TILE), np.float32)
    flags = np.empty(TILE, np.uint8)
    for start in range(0, width, TILE):
        size = min(TILE, width - start)
        stop, low, high = start + size, numbers[0, :size], numbers[1, :size]
        own = (room[0, :size], room[1, :size])  # rows of a cut array would not be contiguous
        for i in range(stream.shape[0]):
            _update(left, right, i, start, low, high)
            changed += _round_integers(
                low, high, factor, stream[i, start:stop], start, zeros, steps,
                (first + i) // steps[5], own, flags[:size], out[i, start:stop],
            )  # fmt: skip
            decode_bytes(out[i, start:stop], np.uint8(8), codes[i, 2 * start : 2 * stop])
            if i % every == 0:
                _measure(low, high, own[0], sums)
    return changed, sums.sum() * _share(stream.shape[0], every)


@kernel
def merge_floats(left, right, factor, stream, first, grid, steps, every, out, codes):  # type: ignore[no-untyped-def]
    """Add C left @ right to rows of small floats of four bits, and round to the base's grid.

    Args:
        left, right, factor, first, steps, every, out: as of `merge_integers`.
        stream: uint8 (rows, in / 2).
        grid: `grid.steps.FloatGrid` of the type.
        codes: uint8 (rows, in), becomes what `out` decodes to.

    Returns:
        as `merge_integers`; a change between -0 and +0 counts as none.
    """
    changed, sums, width = 0, np.zeros(LANES), stream.shape[1]
    numbers, room = np.empty((2, TILE), right.dtype), np.empty((ROOM, TILE), np.float32)
    halves_ = np.empty((4, TILE), np.uint8)
    for start in range(0, width, TILE):
        size = min(TILE, width - start)
        stop, low, high = start + size, numbers[0, :size], numbers[1, :size]
        own = (room[0, :size], room[1, :size], room[2, :size], room[3, :size])
        split = (halves_[0, :size], halves_[1, :size], halves_[2, :size], halves_[3, :size])
        for i in range(stream.shape[0]):
            _update(left, right, i, start, low, high)
            changed += _round_floats(
                low, high, factor, stream[i, start:stop], start, grid, steps,
                (first + i) // steps[5], own, split, out[i, start:stop],
            )  # fmt: skip
            decode_bytes(out[i, start:stop], np.uint8(0), codes[i, 2 * start : 2 * stop])
            if i % every == 0:
                _measure(low, high, own[0], sums)
    return changed, sums.sum() * _share(stream.shape[0], every)


MERGE = (merge_integers, merge_floats)
"""The kernels for integers and for small floats."""
