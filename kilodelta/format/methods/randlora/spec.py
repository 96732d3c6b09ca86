"""RandLoRA: options, exact expansion, bound and scalar reference.

Source: Albert et al., https://arxiv.org/abs/2502.00987; docs/format.md, section 6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np

from kilodelta.exact import reference
from kilodelta.exact.bases import BLOCK, Ints, Stream
from kilodelta.format.fields import RANK, Check, one_of, whole_in
from kilodelta.format.methods.base import Coefficients, Method, magnitude
from kilodelta.format.packing import Group
from kilodelta.format.targets import Shape, Target

ROLE_A, ROLE_B = 2, 3
"""Philox roles of A and of the B_j."""

TERNARY_BLOCK = 4
"""Ternary bases that one Philox call serves."""


@dataclass(frozen=True, kw_only=True)
class RandLora(Method):
    """dQ = sum_j B_j diag(lambda_j) A diag(gamma_j), transposed where out < in.

    With lambda folded into B and gamma into A, the sum is one product of int8 matrices whose
    inner dimension is n r, n = ceil(min(out, in) / r).
    """

    name: ClassVar[str] = "randlora"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.00987"
    checks: ClassVar[Mapping[str, Check]] = MappingProxyType(
        {"rank": RANK, "basis": one_of("sign", "ternary"), "sparsity": whole_in(1, 1 << 20)}
    )
    trainable: ClassVar[str] = "kilodelta.format.methods.randlora.train:RandLoraFactors"
    on_gpu: ClassVar[str] = "kilodelta.format.methods.randlora.gpu:draws"
    roles: ClassVar[tuple[int, ...]] = (ROLE_A, ROLE_B)
    bits: ClassVar[tuple[int, ...]] = (4, 8)
    """lambda folds into B and gamma into A, and both factors must stay int8."""
    more_costs_more: ClassVar[bool] = False
    """A higher rank needs fewer bases, and so fewer coefficients."""
    full_rank: ClassVar[bool] = True
    rank: int = 32
    basis: Literal["sign", "ternary"] = "sign"
    sparsity: int = 0
    """s of the ternary basis: one entry in s is not zero; 0 for the sign basis."""

    @classmethod
    def option_names(cls, options: Mapping[str, Any]) -> set[str]:
        """Leave the sparsity out where the basis is not ternary."""
        unused = set() if options.get("basis") == "ternary" else {"sparsity"}
        return super().option_names(options) - unused

    @property
    def rate(self) -> float:
        """The usual one for Adam."""
        return 1e-3

    @property
    def variant(self) -> str:
        return self.basis

    @classmethod
    def samples(cls) -> tuple[RandLora, ...]:
        return cls(rank=3), cls(rank=2, basis="ternary", sparsity=3)

    def groups(self, target: Target) -> tuple[Group, ...]:
        """Return lambda (n, r) and gamma (n, m)."""
        small, n = min(target.matrix), self.count(target.matrix)
        return Group(name="lambda", shape=(n, self.rank)), Group(name="gamma", shape=(n, small))

    def count(self, shape: Shape) -> int:
        """Return n, the number of products that make a full rank."""
        return -(-min(shape) // self.rank)

    def left(self, q: Coefficients, target: Target, stream: Stream, rows: range) -> Ints:
        """Compute B diag(lambda), int8 (rows, r n); where out < in, the other factor transposed."""
        out, in_ = target.matrix
        if out < in_:
            return self._small_side(q, stream, rows).transpose(1, 0, 2).reshape(len(rows), -1)
        return self._large_side(q, stream, rows).reshape(len(rows), -1)

    def right(self, q: Coefficients, target: Target, stream: Stream) -> Ints:
        """Compute A diag(gamma), int8 (r n, in); where out < in, the other factor transposed."""
        out, in_ = target.matrix
        if out < in_:
            return np.ascontiguousarray(self._large_side(q, stream, range(in_)).reshape(in_, -1).T)
        side = self._small_side(q, stream, range(in_))
        return np.ascontiguousarray(side.transpose(0, 2, 1)).reshape(-1, in_)

    def _large_side(self, q: Coefficients, stream: Stream, rows: range) -> Ints:
        """Draw lambda_j[rho] B_j[row, rho], (rows, r, n)."""
        return self.draw(stream, ROLE_B, q["lambda"], rows, range(self.rank))

    def _small_side(self, q: Coefficients, stream: Stream, columns: range) -> Ints:
        """Draw A[rho, column] gamma_j[column], (r, columns, n)."""
        ones = np.ones((1, columns.stop), np.int8)
        A = self.draw(stream, ROLE_A, ones, range(self.rank), columns)
        gamma = q["gamma"][:, columns.start : columns.stop].T
        scaled: Ints = A * gamma[None, :, :]
        return scaled

    def draw(self, stream: Stream, role: int, values: Ints, rows: range, columns: range) -> Ints:
        """Draw the bases of a role, base j times values[j, column]: (rows, columns, n).

        Args:
            stream: the random bases of the file's seed.
            role: of the bases.
            values: signed integers (n, width); the result has their type.
            rows, columns: the slice of each basis.
        """
        if self.basis == "ternary":
            return stream.ternary(role, self.sparsity, values, rows, columns)
        return stream.signs(role, values, rows, columns)

    def inner(self, target: Target) -> int:
        """Return n r, at least the shorter side: the rank is full."""
        return self.count(target.matrix) * self.rank

    def draws(self, target: Target) -> int:
        """Count a call for each entry of A, and for each entry of B and block of bases."""
        a_call = TERNARY_BLOCK if self.basis == "ternary" else BLOCK
        calls = -(-self.count(target.matrix) // a_call)
        return self.rank * (max(target.matrix) * calls + min(target.matrix))

    def bound(self, q: Coefficients) -> int:
        """Take the largest sum of a column, sum_j (sum_rho lambda_j) gamma_j in magnitudes."""
        per_base = magnitude(q["lambda"]).sum(axis=1)[:, None] * magnitude(q["gamma"])
        return int(per_base.sum(axis=0).max())

    def scales(self) -> tuple[str, ...]:
        return "lambda", "gamma"

    def scalar(
        self, q: Mapping[str, Any], shape: Shape, seed: int, index: int = 0
    ) -> reference.Matrix:
        ternary = self.basis == "ternary"
        entry = reference.ternary(seed, self.sparsity) if ternary else reference.sign(seed)
        ranks, n = range(self.rank), range(ceil(min(shape) / self.rank))
        lambda_, gamma = q["lambda"], q["gamma"]

        def element(large: int, small: int) -> int:
            return sum(
                entry(ROLE_B, j, large, p) * lambda_[j][p] * entry(ROLE_A, 0, p, small)
                * gamma[j][small]
                for j in n
                for p in ranks
            )  # fmt: skip

        out, in_ = (range(side) for side in shape)
        if shape[0] < shape[1]:
            return [[element(x, y) for x in in_] for y in out]
        return [[element(y, x) for x in in_] for y in out]
