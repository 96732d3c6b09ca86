"""Coefficients: small signed integers with a scale c * 2^e, and how they are packed.

docs/format.md, section 6. A group is one array of coefficients that shares a scale.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, frexp, ldexp, prod
from typing import Any

import numpy as np
import numpy.typing as npt

from kilodelta.errors import FileError, InputError
from kilodelta.files import dtypes

BITS = (4, 8, 16)
Ints = npt.NDArray[Any]
Floats = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Group:
    """A named array of coefficients within a target, or of the whole file.

    `dtype` is empty for coefficients, which have the file's own type; else the safetensors type in
    which a compatibility form keeps something that is none (seeds, fingerprints, a whole basis).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = ""

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Scale:
    """A group's scale c * 2^e: c an integer 1..255, e an integer -128..127."""

    c: int = 1
    e: int = 0

    @property
    def value(self) -> float:
        return ldexp(self.c, self.e)


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """A group's coefficients `q` (integers, in the group's shape) and their scale."""

    q: Ints
    scale: Scale

    @property
    def value(self) -> Floats:
        """What the group stands for: q * c * 2^e, float64."""
        return self.q.astype(np.float64) * self.scale.value


def largest(bits: int) -> int:
    """The largest magnitude of a coefficient: the range is symmetric, so that -q always fits."""
    return (1 << (bits - 1)) - 1


def storage(bits: int) -> type[np.signedinteger[Any]]:
    """The numpy type that holds coefficients of so many bits."""
    return np.int16 if bits == 16 else np.int8


def packed_size(count: int, bits: int) -> int:
    """Bytes of a packed group; each starts on a byte."""
    return (count * bits + 7) // 8


def groups_size(groups: Iterable[Group], bits: int) -> int:
    """Bytes of packed groups, one after the other."""
    return sum(group_size(group, bits) for group in groups)


def group_size(group: Group, bits: int) -> int:
    """Bytes of one group."""
    return packed_size(group.size, dtypes.DTYPES[group.dtype].bits if group.dtype else bits)


def pack(q: Ints, bits: int) -> Ints:
    """Coefficients in row-major order to uint8: little-endian, for 4 bits the low nibble first.

    Raises:
        InputError: a coefficient lies outside the symmetric range.
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
    nibbles[: flat.size] = flat & 15
    return (nibbles[::2] | (nibbles[1::2] << 4)).astype(np.uint8)


def unpack(data: Ints, count: int, bits: int) -> Ints:
    """The inverse of `pack`: int8 (4 and 8 bits) or int16, (count,).

    Raises:
        FileError: the most negative value, or bits set in the last byte's unused half.
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
    return ((pairs[:count].astype(np.int8) ^ 8) - 8).astype(np.int8)


def scale_above(step: float, c_max: int = 255) -> Scale:
    """The smallest scale c * 2^e >= step with c in (c_max / 2, c_max].

    Raises:
        InputError: the step is not finite, or beyond what an 8-bit exponent can say.
    """
    if step <= 0:
        return Scale()
    if not np.isfinite(step):
        raise InputError("a coefficient is not finite", fix="train with a lower learning rate")
    e = frexp(step / c_max)[1]
    while ceil(ldexp(step, -(e - 1))) <= c_max:
        e -= 1
    c = ceil(ldexp(step, -e))
    if not -128 <= e <= 127:
        raise InputError(f"a scale of {step:g} has no 8-bit exponent", fix="rescale the update")
    return Scale(c, e)


def scale_near(value: float, c_max: int = 255) -> Scale:
    """The scale nearest to a positive number."""
    above = scale_above(value, c_max)
    below = Scale(max(1, above.c - 1), above.e)
    return min(above, below, key=lambda scale: abs(scale.value - value))


def quantise(values: Floats, bits: int, c_max: int = 255) -> Quantised:
    """Round a group of floats to integers with the scale that errs least in the mean square.

    Args:
        values: float, any shape.
        bits: 4, 8 or 16.
        c_max: the largest mantissa of the scale; smaller ones leave more room for exact sums.
    """
    floats = np.asarray(values, dtype=np.float64)
    peak = float(np.abs(floats).max(initial=0.0)) / largest(bits)
    clips = (1.0,) if bits > 4 else np.linspace(1.0, 0.5, 21)
    scales = dict.fromkeys(scale_above(peak * clip, c_max) for clip in clips)
    tries = [_round(floats, bits, scale) for scale in scales]
    return min(tries, key=lambda found: float(np.square(found.value - floats).sum()))


def _round(floats: Floats, bits: int, scale: Scale) -> Quantised:
    top = largest(bits)
    q = np.clip(np.rint(floats / scale.value), -top, top).astype(storage(bits))
    return Quantised(q=q, scale=scale)
