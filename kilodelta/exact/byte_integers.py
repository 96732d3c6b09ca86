"""Round bytes of two four-bit integers each, both in the lane of their byte.

A stored nibble is n = code + 8, and with q = delta / step the new one is

    clamp(nearest(n - z + q) + z) = clamp(nearest(n + q))        but for ties, as z is an integer

so no zero point is needed where n + q is not near a tie. A tile is rounded so in few operations:

1. Of the nibble's bits and an exponent the float32 m = 1.5 2^23 + n is put together; between 2^23
   and 2^24 the float32 are the integers.
2. s = m + q therefore *is* rounded to an integer by being stored, with a fused multiply-add or
   without, and s - m is the whole number of steps that the code moves by, exactly.
3. d = q - (s - m) is how far q is from it.
4. The bits of positive floats are ordered as the floats are, and those of negative ones are below
   them as int32: so s is clamped to 0 .. 15 by its bits, wherever it is.

**The bound.** Where the result is not clamped, |n + q| < 16 and |n| <= 15, so that the bound of
`exact.quotients` on the error of q and of d, 2^-24 * 8 (|n + q| + |n|), is at most 2^-24 * 8 * 31
(`CERTAIN` is a half less that). With |d| up to CERTAIN no tie is between q and its true value, and
s is the one nearest integer. It is more than twice what |q| <= 31 can be off by, so that two loops,
one of which fuses and one does not, may differ on what is in doubt.

Where s is beyond an end, q is in truth beyond it too, or before it by less than a half plus
2^-22 |q|, and is clamped to it either way (|q| <= 2^20; beyond that the true one is beyond 2^19).
What has a larger |d|, `exact.nearest` decides: of codes that move by more than 2^22 steps, where s
is no longer rounded to integers, that may be all.
"""

from __future__ import annotations

import numpy as np

from kilodelta.exact.compiled import kernel
from kilodelta.exact.nearest import nearest_integer

CERTAIN = np.nextafter(np.float32(0.5 - 2.0**-24 * 8 * 31), np.float32(0))
"""The distance to the nearest integer up to which a float32 result is certain."""

_MAGIC = np.float32(1.5 * 2.0**23).view(np.uint32)
_LOWEST, _HIGHEST = np.int32(_MAGIC), np.int32(_MAGIC + np.uint32(15))
_SIZE = np.uint32(0x7FFFFFFF)
"""The bits of a float32 but its sign."""
_CERTAIN = CERTAIN.view(np.uint32)


@kernel(fastmath={"contract"})
def _rounded(nibble, number, ratio):  # type: ignore[no-untyped-def]
    """Round one weight.

    Args:
        nibble: what is stored of it, uint32.
        number: dQ, float32.
        ratio: float32.

    Returns:
        the new nibble, int32, and the bits of |d|, uint32.
    """
    stored = np.uint32(nibble | _MAGIC).view(np.float32)
    new = np.float32(stored + number * ratio)
    off = np.float32(number * ratio - np.float32(new - stored))
    bits = min(max(np.int32(new.view(np.uint32)), _LOWEST), _HIGHEST)
    return np.int32(bits & np.int32(15)), np.uint32(off.view(np.uint32) & _SIZE)


@kernel(fastmath={"contract"})
def round_integers(low, high, stream, ratios, out):  # type: ignore[no-untyped-def]
    """Round a tile of bytes of integer codes, as far as the quotients are certain.

    Args:
        low, high: dQ of the low and of the high halves, (n,), integers of any type.
        stream: uint8 (n,), the old bytes.
        ratios: float32 (n,), C 2^e over the step of each byte; 0 where that is 0.
        out: uint8 (n,).

    Returns:
        whether any weight is in doubt.
    """
    far = np.uint32(0)
    for j in range(stream.size):
        byte, ratio = np.uint32(stream[j]), ratios[j]
        first, second = np.float32(low[j]), np.float32(high[j])
        lower, lower_off = _rounded(np.uint32(byte & np.uint32(15)), first, ratio)
        upper, upper_off = _rounded(np.uint32(byte >> np.uint32(4)), second, ratio)
        far = max(far, max(lower_off, upper_off))
        out[j] = np.uint8(lower | (upper << np.int32(4)))
    return far > _CERTAIN


@kernel(fastmath={"contract"})
def _mark_doubts(low, high, stream, ratios, out):  # type: ignore[no-untyped-def]
    """Say of each byte of a tile whether one of both weights is in doubt, uint8 (n,), 1 or 0."""
    for j in range(stream.size):
        byte, ratio = np.uint32(stream[j]), ratios[j]
        first, second = np.float32(low[j]), np.float32(high[j])
        _, lower_off = _rounded(np.uint32(byte & np.uint32(15)), first, ratio)
        _, upper_off = _rounded(np.uint32(byte >> np.uint32(4)), second, ratio)
        out[j] = np.uint8(max(lower_off, upper_off) > _CERTAIN)


@kernel
def decide_integers(  # type: ignore[no-untyped-def]
    low, high, stream, ratios, steps, row, groups, zeros, factor, base, room, out
):
    """Round again, in exact integers, what `round_integers` left in doubt.

    Args:
        low, high, stream, ratios, out: as `round_integers` took and left them.
        steps: float64 (rows, groups).
        row: which of them.
        groups: the group of each byte of the tile, int64 (n,).
        zeros: int16, of the shape of the steps; (0, 0) where all are zero.
        factor: C, float64.
        base: e + 1.
        room: uint8 (n,), overwritten.
    """
    _mark_doubts(low, high, stream, ratios, room)
    words = room[: stream.size // 8 * 8].view(np.uint64)
    for k in range((stream.size + 7) // 8):
        if k < words.size and words[k] == 0:  # eight bytes at once: few are in doubt
            continue
        for j in range(8 * k, min(8 * k + 8, stream.size)):
            step = steps[row, groups[j]]
            if room[j] and step != 0.0:
                zero = np.int64(zeros[row, groups[j]]) if zeros.size else np.int64(0)
                byte = np.int64(stream[j])
                # both of them: the one that is not in doubt comes out as it was
                lower = _decided(byte & np.int64(15), low[j], step, zero, factor, base)
                upper = _decided(byte >> np.int64(4), high[j], step, zero, factor, base)
                out[j] = np.uint8(lower | (upper << np.int64(4)))


@kernel
def _decided(nibble, number, step, zero, factor, base):  # type: ignore[no-untyped-def]
    """Return a stored nibble's new value in exact integers, int64.

    Args:
        nibble: the old one, int64.
        number: dQ.
        step: float64, not zero.
        zero: the zero point, int64.
        factor: C, float64.
        base: e + 1.
    """
    whole, eight = np.int64(np.float64(number) * factor), np.int64(8)
    low, high = np.int64(-8), np.int64(7)
    return nearest_integer(whole, step, base, nibble - eight, zero, low, high) + eight
