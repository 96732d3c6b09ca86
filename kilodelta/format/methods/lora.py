"""LoRA: a low-rank delta whose factors are the coefficients themselves.

Source: Hu et al., https://arxiv.org/abs/2106.09685
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kilodelta.exact.bases import Stream
from kilodelta.format.coefficients import Group
from kilodelta.format.methods.base import Coefficients, Ints, magnitude
from kilodelta.format.targets import Target


@dataclass(frozen=True, kw_only=True)
class Lora:
    """dQ = B A with A (r, in) and B (out, r)."""

    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "https://arxiv.org/abs/2106.09685"
    rank: int = 1

    def shared(self) -> tuple[Group, ...]:
        return ()

    def groups(self, target: Target) -> tuple[Group, ...]:
        out, in_ = target.matrix
        return Group(name="A", shape=(self.rank, in_)), Group(name="B", shape=(out, self.rank))

    def left(self, q: Coefficients, target: Target, stream: Stream, rows: range) -> Ints:
        """B, of the coefficients' type, (rows, r)."""
        return q["B"][rows.start : rows.stop]

    def right(self, q: Coefficients, target: Target, stream: Stream) -> Ints:
        """A, of the coefficients' type, (r, in)."""
        return q["A"]

    def bound(self, q: Coefficients) -> int:
        per_rank = magnitude(q["B"]).max(axis=0) * magnitude(q["A"]).max(axis=1)
        return int(per_rank.sum())

    def scales(self) -> tuple[str, ...]:
        return "A", "B"
