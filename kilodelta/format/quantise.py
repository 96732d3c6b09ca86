"""Round floats to small integers with a scale c * 2^e.

docs/format.md, section 6. `kilodelta.compress.training.quantise_ste` is the same rule in torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, frexp, ldexp
from typing import Any

import numpy as np
import numpy.typing as npt

from kilodelta.errors import InputError
from kilodelta.format.packing import Ints, largest, storage

Floats = npt.NDArray[Any]

CLIPS = tuple(float(clip) for clip in np.linspace(1.0, 0.5, 21))
"""Shares of the largest value that 4 bits try as the end of their range: clipping a long tail
makes the steps for all other values finer."""


@dataclass(frozen=True)
class Scale:
    """A group's scale c * 2^e: c an integer 1..255, e an integer -128..127."""

    c: int = 1
    e: int = 0

    @property
    def value(self) -> float:
        """c * 2^e."""
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


def scale_above(step: float, c_max: int = 255) -> Scale:
    """Return the smallest scale c * 2^e >= step with c in (c_max / 2, c_max].

    Raises:
        InputError: the step is not finite, or beyond what an 8-bit exponent can say.

    Example:
        >>> scale_above(0.1)
        Scale(c=205, e=-11)
    """
    if step <= 0:
        return Scale()
    if not np.isfinite(step):
        raise InputError("a coefficient is not finite", fix="train with a lower learning rate")
    e = frexp(step / c_max)[1]
    # `step / c_max` was rounded, so the exponent may be one too large; ldexp and ceil are exact.
    while ceil(ldexp(step, -(e - 1))) <= c_max:
        e -= 1
    c = ceil(ldexp(step, -e))
    if not -128 <= e <= 127:
        raise InputError(f"a scale of {step:g} has no 8-bit exponent", fix="rescale the update")
    return Scale(c, e)


def scale_near(value: float, c_max: int = 255) -> Scale:
    """Return the scale nearest to a positive number.

    Raises:
        InputError: as `scale_above`.
    """
    above = scale_above(value, c_max)
    below = Scale(max(1, above.c - 1), above.e)
    return min(above, below, key=lambda scale: abs(scale.value - value))


def quantise(values: Floats, bits: int, c_max: int = 255) -> Quantised:
    """Round a group of floats to integers with the scale of the least mean square error.

    Args:
        values: float, any shape.
        bits: 4, 8 or 16.
        c_max: the largest mantissa of the scale; a smaller one leaves more room for exact sums.

    Raises:
        InputError: a value is not finite or too large.

    Example:
        >>> quantise(np.array([0.5, -1.0, 0.25]), 8).q.tolist()
        [63, -126, 32]
    """
    floats = np.asarray(values, dtype=np.float64)
    peak = float(np.abs(floats).max(initial=0.0)) / largest(bits)
    # With 4 bits a few outliers waste most of the steps; clipping them may lose less in all.
    clips = CLIPS if bits == 4 else (1.0,)
    scales = dict.fromkeys(scale_above(peak * clip, c_max) for clip in clips)
    candidates = [_round(floats, bits, scale) for scale in scales]
    return min(candidates, key=lambda rounded: float(np.square(rounded.value - floats).sum()))


def _round(floats: Floats, bits: int, scale: Scale) -> Quantised:
    top = largest(bits)
    q = np.clip(np.rint(floats / scale.value), -top, top).astype(storage(bits))
    return Quantised(q=q, scale=scale)
