"""VeRA: two random sign matrices shared by all layers, scaled by two trained vectors a layer.

Source: Kopiczko et al., https://arxiv.org/abs/2310.11454
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kilodelta.exact.bases import Role, Stream
from kilodelta.format.coefficients import Group
from kilodelta.format.methods.base import Coefficients, Ints, magnitude, peak
from kilodelta.format.targets import Target


@dataclass(frozen=True, kw_only=True)
class Vera:
    """dQ = diag(b) B diag(lambda) A with A (r, in) and B (out, r) sign bases."""

    name: ClassVar[str] = "vera"
    paper: ClassVar[str] = "https://arxiv.org/abs/2310.11454"
    rank: int = 256

    def shared(self) -> tuple[Group, ...]:
        return ()

    def groups(self, target: Target) -> tuple[Group, ...]:
        out, _ = target.matrix
        return Group(name="lambda", shape=(self.rank,)), Group(name="b", shape=(out,))

    def left(self, q: Coefficients, target: Target, stream: Stream, rows: range) -> Ints:
        """diag(b) B diag(lambda), int64 (rows, r)."""
        lambda_ = q["lambda"].astype(np.int64)[None, :]
        signed = stream.signs(Role.VERA_B, lambda_, rows, range(self.rank))[:, :, 0]
        found: Ints = signed * q["b"][rows.start : rows.stop].astype(np.int64)[:, None]
        return found

    def right(self, q: Coefficients, target: Target, stream: Stream) -> Ints:
        """A, int8 (r, in)."""
        return stream.sign(Role.VERA_A, 0, range(self.rank), range(target.matrix[1]))

    def bound(self, q: Coefficients) -> int:
        return peak(q["b"]) * int(magnitude(q["lambda"]).sum())

    def scales(self) -> tuple[str, ...]:
        return "lambda", "b"
