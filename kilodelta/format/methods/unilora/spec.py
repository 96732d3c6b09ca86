"""Uni-LoRA: options, exact expansion, bound and scalar reference.

Source: Li et al., https://arxiv.org/abs/2506.00799; docs/format.md, section 6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from kilodelta.exact import reference
from kilodelta.exact.bases import Ints, Stream
from kilodelta.format.fields import BASES, RANK, Check, whole_in
from kilodelta.format.methods.base import Coefficients, Method, peak
from kilodelta.format.packing import Group
from kilodelta.format.targets import Shape, Target

ROLE_S, ROLE_U, ROLE_V = 6, 7, 8
"""Philox roles of the anchor's basis and of the picks for U and for V."""

LARGEST_ANCHOR = 32767


@dataclass(frozen=True, kw_only=True)
class UniLora(Method):
    """dQ = V (a S + U): U (r, in), V (out, r) signed picks from theta, S (r, in) a sign basis."""

    name: ClassVar[str] = "unilora"
    paper: ClassVar[str] = "https://arxiv.org/abs/2506.00799"
    checks: ClassVar[Mapping[str, Check]] = MappingProxyType(
        {"rank": RANK, "bases": BASES, "anchor": whole_in(-LARGEST_ANCHOR, LARGEST_ANCHOR)}
    )
    trainable: ClassVar[str] = "kilodelta.format.methods.unilora.train:UniLoraFactors"
    on_gpu: ClassVar[str] = "kilodelta.format.methods.unilora.gpu:draws"
    roles: ClassVar[tuple[int, ...]] = (ROLE_S, ROLE_U, ROLE_V)
    bought: ClassVar[str] = "bases"
    rank: int = 4
    bases: int = 4608
    """Length of theta, k."""
    anchor: int = 0
    """a, in units of theta's integers."""

    @property
    def rate(self) -> float:
        """The best of those tried on a sentence encoder."""
        return 1.5e-2

    @classmethod
    def samples(cls) -> tuple[UniLora, ...]:
        return cls(rank=3, bases=50), cls(rank=3, bases=50, anchor=9)

    @classmethod
    def of_size(cls, value: int, sides: Sequence[Shape]) -> UniLora:
        """Keep the usual rank above the shorter side: theta is shared, so it costs nothing."""
        base = cls()
        return replace(base, rank=min(base.rank, min(map(max, sides))), bases=value)

    def shared(self) -> tuple[Group, ...]:
        """Return theta (k,)."""
        return (Group(name="theta", shape=(self.bases,)),)

    def groups(self, target: Target) -> tuple[Group, ...]:
        """Return a group without coefficients; its scale is the size of the target's update."""
        return (Group(name="size", shape=(0,)),)

    def left(self, q: Coefficients, target: Target, stream: Stream, rows: range) -> Ints:
        """Draw V, int64 (rows, r)."""
        theta = q["theta"].astype(np.int64)
        return stream.pick(ROLE_V, target.index, theta, rows, range(self.rank))

    def right(self, q: Coefficients, target: Target, stream: Stream) -> Ints:
        """Draw a S + U, int64 (r, in)."""
        place = range(self.rank), range(target.matrix[1])
        U = stream.pick(ROLE_U, target.index, q["theta"].astype(np.int64), *place)
        if self.anchor:
            U += self.anchor * stream.sign(ROLE_S, 0, *place).astype(np.int64)
        return U

    def draws(self, target: Target) -> int:
        """Count a call for each pick, and for each entry of the anchor."""
        out, in_ = target.matrix
        return self.rank * (out + in_ * (2 if self.anchor else 1))

    def bound(self, q: Coefficients) -> int:
        """Let every pick be theta's largest entry, with signs that agree."""
        top = peak(q["theta"])
        return self.rank * top * (abs(self.anchor) + top)

    def scales(self) -> tuple[str, ...]:
        return "theta", "theta", "size"

    def scalar(
        self, q: Mapping[str, Any], shape: Shape, seed: int, index: int = 0
    ) -> reference.Matrix:
        entry, ranks, theta = reference.sign(seed), range(self.rank), q["theta"]

        def pick(role: int, row: int, column: int) -> int:
            w0, w1, _, _ = reference.words(seed, row, column, index, role)
            return int(theta[w0 * len(theta) >> 32]) * (-1 if w1 & 1 else 1)

        def right(p: int, x: int) -> int:
            return self.anchor * entry(ROLE_S, 0, p, x) + pick(ROLE_U, p, x)

        out, in_ = (range(side) for side in shape)
        return [[sum(pick(ROLE_V, y, p) * right(p, x) for p in ranks) for x in in_] for y in out]
