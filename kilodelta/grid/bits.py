"""Pack and unpack codes of 1 to 8 bits: one little-endian bit stream per row, low bits first.

Every layout of this room is such a stream once its words and rows are put in order: little-endian
words of any width follow each other as their bytes do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
_BLOCK = 1 << 16
"""Bytes of nibbles at a time, so that they stay in the second cache."""


def unpack_bits(stream: Bytes, bits: int) -> Bytes:
    """Unpack every whole code of each row.

    Args:
        stream: uint8 (rows, nbytes).
        bits: of one code, 1 to 8.

    Returns:
        uint8 (rows, 8 * nbytes // bits).

    Example:
        >>> unpack_bits(np.array([[0x21, 0x43]], np.uint8), 4).tolist()
        [[1, 2, 3, 4]]
    """
    rows, nbytes = stream.shape
    if bits == 8:
        return stream
    if bits == 4:
        codes = np.empty((rows, 2 * nbytes), np.uint8)
        pairs = codes.reshape(-1).view("<u2")
        flat = stream.reshape(-1)
        for start in range(0, flat.size, _BLOCK):
            # 0xhl becomes 0x0h0l: the low code is the first byte of the pair
            pair = flat[start : start + _BLOCK].astype("<u2")
            pair |= pair << 4
            pair &= 0x0F0F
            pairs[start : start + _BLOCK] = pair
        return codes
    count = 8 * nbytes // bits
    flat = np.unpackbits(stream, axis=1, bitorder="little")[:, : count * bits]
    weights = (1 << np.arange(bits)).astype(np.uint8)
    codes = (flat.reshape(rows, count, bits) * weights).sum(axis=2, dtype=np.uint8)
    return np.asarray(codes)


def unpack_signed(stream: Bytes, bits: int, count: int) -> npt.NDArray[np.int8]:
    """Unpack the first codes of each row, which are stored plus 2^(bits-1).

    Args:
        stream: uint8 (rows, nbytes).
        bits: of one code, 1 to 8.
        count: codes of a row.

    Returns:
        int8 (rows, count).

    Example:
        >>> unpack_signed(np.array([[0x08, 0xF7]], np.uint8), 4, 3).tolist()
        [[0, -8, -1]]
    """
    half = np.uint8(1 << (bits - 1))
    if bits != 4:
        return (unpack_bits(stream, bits)[:, :count] - half).view(np.int8)  # modulo 256
    from kilodelta.exact.nibbles import read_nibbles  # loads numba, which takes a while

    codes = np.empty((stream.shape[0], count), np.uint8)
    read_nibbles(np.ascontiguousarray(stream), half, codes)
    return codes.view(np.int8)


def pack_bits(codes: npt.NDArray[Any], bits: int, nbytes: int, *, offset: int = 0) -> Bytes:
    """Pack codes as `unpack_bits` reads them; bits behind the last code are zero.

    Args:
        codes: uint8 or int8 (rows, count); plus `offset`, each is from 0 to below 2^bits.
        bits: of one code, 1 to 8.
        nbytes: of a packed row.
        offset: added to each code first, such as 8 for signed codes that are stored plus 8.

    Returns:
        uint8 (rows, nbytes).

    Example:
        >>> pack_bits(np.array([[1, 2, 3]], np.uint8), 4, 2).tolist()
        [[33, 3]]
    """
    rows, count = codes.shape
    if codes.dtype == np.int8:
        codes = codes.view(np.uint8)
    if bits == 4:
        from kilodelta.exact.nibbles import write_nibbles  # loads numba, which takes a while

        # A code of -offset is stored as 0, as are the bits behind the last one.
        even = _padded(codes, 2 * nbytes, -offset & 255)
        packed = np.empty((rows, nbytes), np.uint8)
        write_nibbles(np.ascontiguousarray(even), np.uint8(offset), packed)
        return packed
    codes = codes + np.uint8(offset)  # modulo 256
    if bits == 8:
        return _padded(codes, nbytes)
    spread = (codes[:, :, None] >> np.arange(bits, dtype=np.uint8)) & np.uint8(1)
    flat = _padded(spread.reshape(rows, count * bits).astype(np.uint8), 8 * nbytes)
    return np.packbits(flat, axis=1, bitorder="little")


def replace_bits(stream: Bytes, bits: int, codes: npt.NDArray[Any], *, offset: int = 0) -> Bytes:
    """Write codes over the first ones of each row; the codes behind them stay as they are.

    Args:
        stream: uint8 (rows, nbytes).
        bits: of one code.
        codes: uint8 or int8 (rows, count), count at most as many as a row holds.
        offset: as of `pack_bits`.

    Returns:
        new bytes, uint8 (rows, nbytes).
    """
    count = codes.shape[1]
    if count * bits == 8 * stream.shape[1]:  # nothing lies behind them
        return pack_bits(codes, bits, stream.shape[1], offset=offset)
    codes = codes.view(np.uint8) + np.uint8(offset)  # modulo 256
    behind = unpack_bits(stream, bits)[:, count:]
    whole = np.concatenate([codes, behind], axis=1) if behind.size else codes
    return pack_bits(whole, bits, stream.shape[1])


def _padded(values: Bytes, length: int, value: int = 0) -> Bytes:
    missing = length - values.shape[1]
    return np.pad(values, ((0, 0), (0, missing)), constant_values=value) if missing else values
