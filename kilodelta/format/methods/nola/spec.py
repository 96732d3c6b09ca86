"""NOLA: options, exact expansion, bound and scalar reference.

Source: Koohpayegani et al., https://arxiv.org/abs/2310.02556; docs/format.md, section 6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np

from kilodelta.exact import reference
from kilodelta.exact.bases import BLOCK, Ints, Stream
from kilodelta.format.fields import BASES, RANK, Check, one_of
from kilodelta.format.methods.base import Coefficients, Method, magnitude
from kilodelta.format.packing import Group
from kilodelta.format.targets import Shape, Target

ROLE_A, ROLE_B = 0, 1
"""Philox roles of the U_i and of the V_j."""


@dataclass(frozen=True, kw_only=True)
class Nola(Method):
    """dQ = (sum_j beta_j V_j) (sum_i alpha_i U_i), V_j (out, r) and U_i (r, in) sign bases."""

    name: ClassVar[str] = "nola"
    paper: ClassVar[str] = "https://arxiv.org/abs/2310.02556"
    checks: ClassVar[Mapping[str, Check]] = MappingProxyType(
        {"rank": RANK, "bases": BASES, "basis": one_of("sign")}
    )
    trainable: ClassVar[str] = "kilodelta.format.methods.nola.train:NolaFactors"
    on_gpu: ClassVar[str] = "kilodelta.format.methods.nola.gpu:draws"
    roles: ClassVar[tuple[int, ...]] = (ROLE_A, ROLE_B)
    bought: ClassVar[str] = "bases"
    shares_bases: ClassVar[bool] = True
    rank: int = 8
    bases: int = 256
    """Matrices summed per factor, k in the paper."""
    basis: Literal["sign"] = "sign"

    @property
    def rate(self) -> float:
        """The usual one for Adam."""
        return 5e-3

    @classmethod
    def samples(cls) -> tuple[Nola, ...]:
        """Return one with more than a block of 128 bases."""
        return (cls(rank=2, bases=130),)

    def groups(self, target: Target) -> tuple[Group, ...]:
        """Return alpha (k,) and beta (k,)."""
        return Group(name="alpha", shape=(self.bases,)), Group(name="beta", shape=(self.bases,))

    def left(self, q: Coefficients, target: Target, stream: Stream, rows: range) -> Ints:
        """Compute sum_j beta_j V_j, int64 (rows, r)."""
        return stream.mix(ROLE_B, q["beta"], rows, range(self.rank))

    def right(self, q: Coefficients, target: Target, stream: Stream) -> Ints:
        """Compute sum_i alpha_i U_i, int64 (r, in)."""
        return stream.mix(ROLE_A, q["alpha"], range(self.rank), range(target.matrix[1]))

    def lefts(self, q: Sequence[Coefficients], targets: Sequence[Target], stream: Stream) -> Ints:
        rows = range(targets[0].matrix[0])
        return stream.mix_many(ROLE_B, np.stack([of["beta"] for of in q]), rows, range(self.rank))

    def rights(self, q: Sequence[Coefficients], targets: Sequence[Target], stream: Stream) -> Ints:
        columns = range(targets[0].matrix[1])
        alphas = np.stack([of["alpha"] for of in q])
        return stream.mix_many(ROLE_A, alphas, range(self.rank), columns)

    def draws(self, target: Target) -> int:
        """Count a call for each entry of both factors and each block of bases."""
        return self.rank * sum(target.matrix) * -(-self.bases // BLOCK)

    def bound(self, q: Coefficients) -> int:
        """Let all signs agree: an entry of a factor is then the sum of its coefficients' sizes."""
        return self.rank * int(magnitude(q["alpha"]).sum()) * int(magnitude(q["beta"]).sum())

    def scales(self) -> tuple[str, ...]:
        return "alpha", "beta"

    def scalar(
        self, q: Mapping[str, Any], shape: Shape, seed: int, index: int = 0
    ) -> reference.Matrix:
        entry, ranks, k = reference.sign(seed), range(self.rank), range(self.bases)
        out, in_ = (range(side) for side in shape)
        A = [[sum(q["alpha"][i] * entry(ROLE_A, i, p, x) for i in k) for x in in_] for p in ranks]
        B = [[sum(q["beta"][j] * entry(ROLE_B, j, y, p) for j in k) for p in ranks] for y in out]
        return [[sum(B[y][p] * A[p][x] for p in ranks) for x in in_] for y in out]
