"""VeRA: options, exact expansion, bound and scalar reference.

Source: Kopiczko et al., https://arxiv.org/abs/2310.11454; docs/format.md, section 6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from kilodelta.exact import reference
from kilodelta.exact.bases import Ints, Stream
from kilodelta.format.fields import RANK, Check
from kilodelta.format.methods.base import Coefficients, Method, magnitude, peak
from kilodelta.format.packing import Group
from kilodelta.format.targets import Shape, Target

ROLE_A, ROLE_B = 4, 5
"""Philox roles of A and of B."""


@dataclass(frozen=True, kw_only=True)
class Vera(Method):
    """dQ = diag(b) B diag(lambda) A with A (r, in) and B (out, r) sign bases."""

    name: ClassVar[str] = "vera"
    paper: ClassVar[str] = "https://arxiv.org/abs/2310.11454"
    checks: ClassVar[Mapping[str, Check]] = MappingProxyType({"rank": RANK})
    trainable: ClassVar[str] = "kilodelta.format.methods.vera.train:VeraFactors"
    on_gpu: ClassVar[str] = "kilodelta.format.methods.vera.gpu:draws"
    roles: ClassVar[tuple[int, ...]] = (ROLE_A, ROLE_B)
    rank: int = 256

    @property
    def rate(self) -> float:
        """The best of those tried on a sentence encoder."""
        return 2e-2

    @classmethod
    def samples(cls) -> tuple[Vera, ...]:
        return (cls(rank=6),)

    def groups(self, target: Target) -> tuple[Group, ...]:
        """Return lambda (r,) and b (out,)."""
        out, _ = target.matrix
        return Group(name="lambda", shape=(self.rank,)), Group(name="b", shape=(out,))

    def left(self, q: Coefficients, target: Target, stream: Stream, rows: range) -> Ints:
        """Compute diag(b) B diag(lambda), int64 (rows, r)."""
        lambda_ = q["lambda"].astype(np.int64)[None, :]
        B_lambda = stream.signs(ROLE_B, lambda_, rows, range(self.rank))[:, :, 0]
        scaled: Ints = B_lambda * q["b"][rows.start : rows.stop].astype(np.int64)[:, None]
        return scaled

    def right(self, q: Coefficients, target: Target, stream: Stream) -> Ints:
        """Draw A, int8 (r, in)."""
        return stream.sign(ROLE_A, 0, range(self.rank), range(target.matrix[1]))

    def draws(self, target: Target) -> int:
        """Count a call for each entry of A and of B."""
        return self.rank * sum(target.matrix)

    def bound(self, q: Coefficients) -> int:
        """Multiply the largest |b| by the sum of |lambda|, for all signs may agree."""
        return peak(q["b"]) * int(magnitude(q["lambda"]).sum())

    def scales(self) -> tuple[str, ...]:
        return "lambda", "b"

    def scalar(
        self, q: Mapping[str, Any], shape: Shape, seed: int, index: int = 0
    ) -> reference.Matrix:
        entry, ranks = reference.sign(seed), range(self.rank)
        lambda_, b = q["lambda"], q["b"]

        def element(y: int, x: int) -> int:
            B_lambda_A = (
                entry(ROLE_B, 0, y, p) * lambda_[p] * entry(ROLE_A, 0, p, x) for p in ranks
            )
            return int(b[y] * sum(B_lambda_A))

        return [[element(y, x) for x in range(shape[1])] for y in range(shape[0])]
