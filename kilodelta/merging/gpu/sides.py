"""From a method's coefficients to the two factors of a target's update, on a unit.

In the letters of docs/format.md, section 6: `out` draws the factor of the rows of W (D, d), `in_`
that of its columns, and dQ is their product over the rank. A method whose folder has a `gpu.py`
draws its factors on the device; the factors of any other are computed on the CPU and copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kilodelta.errors import InputError
from kilodelta.exact.bases import Ints, Stream
from kilodelta.format.methods import Coefficients, Method, load_part
from kilodelta.format.methods.base import peak
from kilodelta.format.targets import Target
from kilodelta.merging.gpu.unit import Bases, Draw, Unit


@dataclass(frozen=True, kw_only=True)
class Sides:
    """The factors of one target's update."""

    out: Draw
    in_: Draw

    def stored(self, target: Target) -> tuple[Draw, Draw]:
        """Return (the rows' factor, the columns' factor) of the tensor as it is stored."""
        return (self.in_, self.out) if target.transposed else (self.out, self.in_)


@dataclass(frozen=True)
class Drawing:
    """What a method draws its factors from, and on which unit."""

    q: Coefficients
    target: Target
    stream: Stream
    unit: Unit

    def rows(self, role: int) -> Bases:
        """Return the bases of a role, whose rows are the factor's lines."""
        return Bases(stream=self.stream, role=role, lines_are_rows=True)

    def columns(self, role: int) -> Bases:
        """Return the bases of a role, whose columns are the factor's lines."""
        return Bases(stream=self.stream, role=role, lines_are_rows=False)


Draws = Callable[[Any, Drawing], Sides]
"""What `Method.on_gpu` names: from the method and a drawing to the factors."""


def sides(method: Method, q: Coefficients, target: Target, stream: Stream, unit: Unit) -> Sides:
    """Prepare the factors of a target's update.

    Args:
        method: of the delta.
        q: the target's coefficients by group, the shared groups among them.
        target: whose update it is.
        stream: the random bases of the file's seed.
        unit: the device.

    Raises:
        InputError: the method has no kernels, and a factor does not fit a device's integers.
    """
    drawing = Drawing(q, target, stream, unit)
    draws: Draws = load_part(method.on_gpu) if method.on_gpu else held
    return draws(method, drawing)


def held(method: Method, drawing: Drawing) -> Sides:
    """Compute both factors on the CPU, and copy them to the device.

    Raises:
        InputError: an entry is 2^31 or more in magnitude.
    """
    q, target, stream = drawing.q, drawing.target, drawing.stream
    left = method.left(q, target, stream, range(target.matrix[0]))
    right = method.right(q, target, stream)
    if max(peak(left), peak(right)) >= 1 << 31:
        raise InputError(
            f"a factor of {target.name} has entries that a GPU's int32 cannot hold",
            fix="merge with device cpu",
        )
    columns: Ints = np.ascontiguousarray(left.T)
    return Sides(out=drawing.unit.held(columns), in_=drawing.unit.held(right))
