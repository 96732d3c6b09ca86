"""Merge updates into rows of nibbles, in the very bytes that hold them.

A byte holds the codes of columns 2 j (its low half) and 2 j + 1. Both are computed in the lane of
that byte, from an update whose even columns lie before its odd ones (`nibbles.halves`): nothing is
moved between lanes of a vector unit, and no array has a byte per code before it is hashed.

Integers are rounded as they lie there (`exact.byte_integers`); codes of small floats are split and
go the way of `exact.quotients`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kilodelta.exact.byte_integers import decide_integers, round_integers
from kilodelta.exact.compiled import kernel
from kilodelta.exact.fused import multiply_row, multiply_two_rows
from kilodelta.exact.nibbles import count_changed, decode_bytes, join_bytes, split_bytes
from kilodelta.exact.quotients import (
    LANES,
    LIMIT,
    ROOM,
    add_magnitudes,
    decide_floats,
    fill_ratios,
    float_tile,
    magnitude_of_all,
)

TILE = 2048
"""Bytes of a row at a time: some dozen views are counted for each, which takes 0.2 us."""
_EIGHT = 8


@kernel(error_model="numpy")
def _group_ratios(steps, scale, out):  # type: ignore[no-untyped-def]
    """Compute scale / step of each step, cut to LIMIT; 0 where the step is 0. Float64 to float32.

    Returns:
        how many steps are 0.
    """
    still = np.int64(0)
    for k in range(steps.size):
        step = steps[k]
        ratio = np.float32(min(max(scale / step, -LIMIT), LIMIT))
        out[k] = ratio if step != 0.0 else np.float32(0)
        still += np.int64(step == 0.0)
    return still


@intrinsic  # type: ignore[untyped-decorator]
def _store_eight(context: Any, array: Any, index: Any, value: Any) -> Any:
    """Store one float32 eight times from an index on: a loop over few of them is not made one."""
    vector, lane = ir.VectorType(ir.FloatType(), _EIGHT), ir.IntType(32)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data, at, number = arguments
        begin = context.make_array(signature.args[0])(context, builder, data).data
        nothing = ir.Constant(vector, ir.Undefined)
        first = builder.insert_element(nothing, number, ir.Constant(lane, 0))
        zeros = ir.Constant(ir.VectorType(lane, _EIGHT), [0] * _EIGHT)
        place = builder.bitcast(builder.gep(begin, [at]), vector.as_pointer())
        builder.store(builder.shuffle_vector(first, nothing, zeros), place, align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.float32), generate


@kernel
def fill_byte_ratios(steps, row, scale, groups, half, start, room, out):  # type: ignore[no-untyped-def]
    """Compute `quotients.fill_ratios` for the bytes of a tile, by a vector unit where it can be.

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
    if half == 0 or start % half:
        return fill_ratios(steps, row, scale, groups, half, start, out)
    first, count = start // half, (out.size + half - 1) // half
    still = _group_ratios(steps[row, first : first + count], scale, room[:count])
    whole = out.size // half
    if half % _EIGHT:
        for k in range(whole):
            out[k * half : (k + 1) * half] = room[k]
    else:
        at = 0
        for k in range(whole):
            for _ in range(half // _EIGHT):
                _store_eight(out, at, room[k])
                at += _EIGHT
    out[whole * half :] = room[count - 1]
    return still > 0


@kernel
def _round_integers(  # type: ignore[no-untyped-def]
    low, high, factor, stream, start, zeros, steps, row, room, flags, out
):
    values, groups, half, scale, base, _ = steps
    own, ratios = groups[start : start + stream.size], room[0]
    fill_byte_ratios(values, row, scale, own, half, start, room[1], ratios)
    if round_integers(low, high, stream, ratios, out):
        decide_integers(
            low, high, stream, ratios, values, row, own, zeros, factor, base, flags, out
        )
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
def _update(left, right, i, start, lows, highs):  # type: ignore[no-untyped-def]
    """Compute the update of a tile of rows i and i + 1, from its factors or as it is at hand."""
    size, second = lows.shape[1], right.shape[1] // 2 + start
    if right.shape[0] == 0:
        last = min(i + 2, left.shape[0])
        lows[: last - i] = left[i:last, start : start + size]
        highs[: last - i] = left[i:last, second : second + size]
    elif i + 1 < left.shape[0]:
        multiply_two_rows(left[i : i + 2], right, start, lows)
        multiply_two_rows(left[i : i + 2], right, second, highs)
    else:
        multiply_row(left[i], right, start, lows[0])
        multiply_row(left[i], right, second, highs[0])


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
    numbers, room = np.empty((2, 2 * TILE), right.dtype), np.empty((2, TILE), np.float32)
    flags = np.empty(TILE, np.uint8)
    for start in range(0, width, TILE):
        size = min(TILE, width - start)
        stop = start + size
        lows, highs = (
            numbers[0, : 2 * size].reshape(2, size),
            numbers[1, : 2 * size].reshape(2, size),
        )
        own = (room[0, :size], room[1, :size])  # rows of a cut array would not be contiguous
        for i in range(stream.shape[0]):
            if i % 2 == 0:
                _update(left, right, i, start, lows, highs)
            low, high = lows[i % 2], highs[i % 2]
            changed += _round_integers(
                low, high, factor, stream[i, start:stop], start, zeros, steps,
                (first + i) // steps[5], own, flags[:size], out[i, start:stop],
            )  # fmt: skip
            decode_bytes(out[i, start:stop], np.uint8(8), codes[i, 2 * start : 2 * stop])
            if i % every == 0:
                _measure(low, high, own[0], sums)
    return changed, magnitude_of_all(sums, stream.shape[0], every)


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
    numbers, room = np.empty((2, 2 * TILE), right.dtype), np.empty((ROOM, TILE), np.float32)
    halves_ = np.empty((4, TILE), np.uint8)
    for start in range(0, width, TILE):
        size = min(TILE, width - start)
        stop = start + size
        lows, highs = (
            numbers[0, : 2 * size].reshape(2, size),
            numbers[1, : 2 * size].reshape(2, size),
        )
        own = (room[0, :size], room[1, :size], room[2, :size], room[3, :size])
        split = (halves_[0, :size], halves_[1, :size], halves_[2, :size], halves_[3, :size])
        for i in range(stream.shape[0]):
            if i % 2 == 0:
                _update(left, right, i, start, lows, highs)
            low, high = lows[i % 2], highs[i % 2]
            changed += _round_floats(
                low, high, factor, stream[i, start:stop], start, grid, steps,
                (first + i) // steps[5], own, split, out[i, start:stop],
            )  # fmt: skip
            decode_bytes(out[i, start:stop], np.uint8(0), codes[i, 2 * start : 2 * stop])
            if i % every == 0:
                _measure(low, high, own[0], sums)
    return changed, magnitude_of_all(sums, stream.shape[0], every)


MERGE = (merge_integers, merge_floats)
"""The kernels for integers and for small floats."""
