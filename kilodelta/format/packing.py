"""Pack small signed integers into bytes, and read them back.

docs/format.md, section 6: coefficients of 4, 8 or 16 bits, little-endian, 4 bits low nibble first,
each group from a byte on. A group is one array of coefficients that shares a scale.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from kilodelta.errors import FileError, InputError
from kilodelta.files import dtypes

BITS = (4, 8, 16)
"""Bits that an integer coefficient may have."""

Ints = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Group:
    """A named array of coefficients within a target, or of the whole file.

    `dtype` is empty for coefficients, which have the file's common type. In a compatibility form it
    is the safetensors type of a group that holds no coefficients: seeds, fingerprints, a basis.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = ""

    @property
    def size(self) -> int:
        """The number of elements."""
        return prod(self.shape)


def largest(bits: int) -> int:
    """Return the largest magnitude of a coefficient: the range is symmetric, so -q always fits."""
    return (1 << (bits - 1)) - 1


def storage(bits: int) -> type[np.signedinteger[Any]]:
    """Return the numpy type that holds coefficients of so many bits."""
    return np.int16 if bits == 16 else np.int8


def packed_size(count: int, bits: int) -> int:
    """Return the bytes of `count` packed coefficients; a group starts on a byte."""
    return (count * bits + 7) // 8


def group_size(group: Group, bits: int) -> int:
    """Return the bytes of one group."""
    return packed_size(group.size, dtypes.DTYPES[group.dtype].bits if group.dtype else bits)


def groups_size(groups: Iterable[Group], bits: int) -> int:
    """Return the bytes of groups that lie one after the other."""
    return sum(group_size(group, bits) for group in groups)


def pack(q: Ints, bits: int) -> Ints:
    """Pack coefficients in row-major order into uint8 (bytes,).

    Raises:
        InputError: a coefficient lies outside the symmetric range.

    Example:
        >>> pack(np.array([1, -1, 7]), 4).tolist()
        [241, 7]
    """
    flat = np.asarray(q).reshape(-1).astype(np.int64)
    if flat.size and int(np.abs(flat).max()) > largest(bits):
        raise InputError(
            f"coefficients up to {np.abs(flat).max()} do not fit {bits} bits",
            fix=f"quantise to at most {largest(bits)}",
        )
    if bits != 4:
        return flat.astype("<i2" if bits == 16 else "i1").view(np.uint8)
    nibbles = np.zeros(flat.size + flat.size % 2, np.uint8)
    # Two's complement in four bits; an odd count leaves the last high nibble zero.
    nibbles[: flat.size] = flat & 15
    return (nibbles[::2] | (nibbles[1::2] << 4)).astype(np.uint8)


def unpack(data: Ints, count: int, bits: int) -> Ints:
    """Unpack uint8 (bytes,) into int8 (4 and 8 bits) or int16, (count,): the inverse of `pack`.

    Raises:
        FileError: a coefficient is the most negative value, or the unused half of the last byte
            is not zero.

    Example:
        >>> unpack(np.array([241, 7], np.uint8), 3, 4).tolist()
        [1, -1, 7]
    """
    if bits == 16:
        q = data.view("<i2").astype(np.int16)
    elif bits == 8:
        q = data.view(np.int8)
    else:
        q = _unpack_nibbles(data, count)
    if count and int(q.min()) < -largest(bits):
        raise FileError(
            f"a coefficient is {int(q.min())}, outside the symmetric {bits}-bit range",
            fix="the file is damaged or not written by kilodelta: fetch it again",
        )
    return q


def _unpack_nibbles(data: Ints, count: int) -> Ints:
    pairs = np.stack((data & 15, data >> 4), axis=-1).reshape(-1)
    if count % 2 and pairs[count]:
        raise FileError("the unused half of a group's last byte is not zero", fix="fetch it again")
    # Flipping bit 3 and subtracting 8 extends the sign of a four-bit two's complement number.
    return ((pairs[:count].astype(np.int8) ^ 8) - 8).astype(np.int8)
