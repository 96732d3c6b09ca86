"""LoRA: options, exact expansion, bound and scalar reference.

Source: Hu et al., https://arxiv.org/abs/2106.09685; docs/format.md, section 6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from types import MappingProxyType
from typing import Any, ClassVar

from kilodelta.exact import reference
from kilodelta.exact.bases import Ints, Stream
from kilodelta.format.fields import RANK, Check
from kilodelta.format.methods.base import Coefficients, Method, magnitude
from kilodelta.format.packing import Group
from kilodelta.format.targets import Shape, Target


@dataclass(frozen=True, kw_only=True)
class Lora(Method):
    """dQ = B A with A (r, in) and B (out, r)."""

    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "https://arxiv.org/abs/2106.09685"
    checks: ClassVar[Mapping[str, Check]] = MappingProxyType({"rank": RANK})
    trainable: ClassVar[str] = "kilodelta.format.methods.lora.train:LoraFactors"
    rank: int = 1

    @property
    def rate(self) -> float:
        """The best of those tried on a sentence encoder at rank 1, over the rank's root.

        The entries of wider factors move together, so that their update grows with the rank
        (rsLoRA, https://arxiv.org/abs/2312.03732).
        """
        return 1e-2 / sqrt(self.rank)

    @classmethod
    def samples(cls) -> tuple[Lora, ...]:
        return (cls(rank=5),)

    def groups(self, target: Target) -> tuple[Group, ...]:
        """Return A (r, in) and B (out, r)."""
        out, in_ = target.matrix
        return Group(name="A", shape=(self.rank, in_)), Group(name="B", shape=(out, self.rank))

    def left(self, q: Coefficients, target: Target, stream: Stream, rows: range) -> Ints:
        """Return rows of B, of the coefficients' type, (rows, r)."""
        return q["B"][rows.start : rows.stop]

    def right(self, q: Coefficients, target: Target, stream: Stream) -> Ints:
        """Return A, of the coefficients' type, (r, in)."""
        return q["A"]

    def draws(self, target: Target) -> int:
        """Return 0: nothing is drawn, for the factors are the coefficients."""
        return 0

    def bound(self, q: Coefficients) -> int:
        """Add, over the ranks, the largest magnitude of B's column times that of A's row."""
        per_rank = magnitude(q["B"]).max(axis=0) * magnitude(q["A"]).max(axis=1)
        return int(per_rank.sum())

    def scales(self) -> tuple[str, ...]:
        return "A", "B"

    def scalar(
        self, q: Mapping[str, Any], shape: Shape, seed: int, index: int = 0
    ) -> reference.Matrix:
        out, in_ = (range(side) for side in shape)
        ranks = range(self.rank)
        return [[sum(q["B"][y][p] * q["A"][p][x] for p in ranks) for x in in_] for y in out]
