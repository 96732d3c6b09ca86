"""Read, write and compare nibbles: codes of four bits, two in a byte, the low half first."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kilodelta.exact.compiled import kernel

_FIRST_BITS, _LOW_HALVES = np.uint64(0x1111111111111111), np.uint64(0x0F0F0F0F0F0F0F0F)


def halves(matrix: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Put the even columns of a matrix before its odd ones; their number is even.

    Example:
        >>> halves(np.array([[0, 1, 2, 3]]))
        array([[0, 2, 1, 3]])
    """
    return np.concatenate([matrix[:, ::2], matrix[:, 1::2]], axis=1)


@kernel
def read_nibbles(stream, offset, out):  # type: ignore[no-untyped-def]
    """Unpack nibbles, the low one of each byte first, less an offset modulo 256.

    Args:
        stream: uint8 (rows, nbytes).
        offset: uint8, such as 8 for codes that are stored plus 8.
        out: uint8 (rows, count), count at most 2 nbytes; nibbles behind are left out.
    """
    rows, count = out.shape
    for i in range(rows):
        packed, codes = stream[i], out[i]
        for j in range(count // 2):
            codes[2 * j] = (packed[j] & np.uint8(15)) - offset
            codes[2 * j + 1] = (packed[j] >> np.uint8(4)) - offset
        if count % 2:
            codes[count - 1] = (packed[count // 2] & np.uint8(15)) - offset


@kernel
def write_nibbles(codes, offset, out):  # type: ignore[no-untyped-def]
    """Pack codes as `read_nibbles` reads them; only the last four bits of the sums count.

    Args:
        codes: uint8 (rows, count), count even.
        offset: uint8, added to each code modulo 256.
        out: uint8 (rows, count / 2).
    """
    for i in range(codes.shape[0]):
        row, packed = codes[i], out[i]
        for j in range(packed.size):
            low = (row[2 * j] + offset) & np.uint8(15)
            packed[j] = low | ((row[2 * j + 1] + offset) << np.uint8(4))


@kernel
def decode_bytes(stream, offset, out):  # type: ignore[no-untyped-def]
    """Unpack bytes into codes less an offset, as `read_nibbles` does: uint8 (n,) to (2 n,)."""
    pairs, off = out.view(np.uint16), np.uint16(offset) * np.uint16(0x0101)
    for j in range(stream.size):
        byte = np.uint16(stream[j])
        pair = (byte | (byte << np.uint16(4))) & np.uint16(0x0F0F)
        # less the offset in each half, without a borrow: subtract from 0x1.., then flip that bit
        pair = np.uint16(np.uint16(pair | np.uint16(0x8080)) - off) ^ np.uint16(0x8080)
        pairs[j] = pair


@kernel
def split_bytes(stream, low, high):  # type: ignore[no-untyped-def]
    """Split bytes into their halves: uint8 (n,) each."""
    for j in range(stream.size):
        low[j] = stream[j] & np.uint8(15)
        high[j] = stream[j] >> np.uint8(4)


@kernel
def join_bytes(low, high, out):  # type: ignore[no-untyped-def]
    """Undo `split_bytes`."""
    for j in range(out.size):
        out[j] = low[j] | (high[j] << np.uint8(4))


@kernel
def count_changed(old, new):  # type: ignore[no-untyped-def]
    """Count the nibbles in which two rows of bytes differ, uint8 (n,)."""
    words, count = old.size // 8, np.uint64(0)
    first, second = old[: words * 8].view(np.uint64), new[: words * 8].view(np.uint64)
    for k in range(words):
        bits = first[k] ^ second[k]
        bits |= bits >> np.uint64(1)
        bits |= bits >> np.uint64(2)  # the first bit of a nibble: whether any of its four is
        bits &= _FIRST_BITS
        sums = (bits + (bits >> np.uint64(4))) & _LOW_HALVES  # of each byte
        sums += sums >> np.uint64(8)
        sums += sums >> np.uint64(16)
        sums += sums >> np.uint64(32)
        count += sums & np.uint64(255)
    more = np.int64(count)
    for j in range(words * 8, old.size):
        bits8 = old[j] ^ new[j]
        more += np.int64((bits8 & np.uint8(15)) != 0) + np.int64((bits8 >> np.uint8(4)) != 0)
    return more
