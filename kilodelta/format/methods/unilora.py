"""Uni-LoRA: one trained vector for the whole model, scattered into every layer's factors.

Source: Li et al., https://arxiv.org/abs/2506.00799
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kilodelta.exact.bases import Role, Stream
from kilodelta.format.coefficients import Group
from kilodelta.format.methods.base import Coefficients, Ints, peak
from kilodelta.format.targets import Target


@dataclass(frozen=True, kw_only=True)
class UniLora:
    """dQ = V (a S + U): U (r, in), V (out, r) signed picks from theta, S (r, in) a sign basis."""

    name: ClassVar[str] = "unilora"
    paper: ClassVar[str] = "https://arxiv.org/abs/2506.00799"
    rank: int = 4
    bases: int = 4608
    """Length of theta, k."""
    anchor: int = 0
    """a, in units of theta's integers."""

    def shared(self) -> tuple[Group, ...]:
        return (Group(name="theta", shape=(self.bases,)),)

    def groups(self, target: Target) -> tuple[Group, ...]:
        return (Group(name="size", shape=(0,)),)

    def left(self, q: Coefficients, target: Target, stream: Stream, rows: range) -> Ints:
        """V, int64 (rows, r)."""
        theta = q["theta"].astype(np.int64)
        return stream.pick(Role.UNILORA_V, target.index, theta, rows, range(self.rank))

    def right(self, q: Coefficients, target: Target, stream: Stream) -> Ints:
        """a S + U, int64 (r, in)."""
        place = range(self.rank), range(target.matrix[1])
        theta = q["theta"].astype(np.int64)
        picked = stream.pick(Role.UNILORA_U, target.index, theta, *place)
        if not self.anchor:
            return picked
        found: Ints = picked + self.anchor * stream.sign(Role.UNILORA_ANCHOR, 0, *place).astype(
            np.int64
        )
        return found

    def bound(self, q: Coefficients) -> int:
        top = peak(q["theta"])
        return self.rank * top * (abs(self.anchor) + top)

    def scales(self) -> tuple[str, ...]:
        return "theta", "theta", "size"
