"""RandLoRA: a full-rank delta, the sum of many low-rank products of random matrices.

Source: Albert et al., https://arxiv.org/abs/2502.00987
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from kilodelta.exact.bases import Role, Stream
from kilodelta.format.coefficients import Group
from kilodelta.format.methods.base import Coefficients, Ints, magnitude
from kilodelta.format.targets import Target


@dataclass(frozen=True, kw_only=True)
class RandLora:
    """dQ = sum_j B_j diag(lambda_j) A diag(gamma_j), transposed where out < in.

    With lambda folded into B and gamma into A, the sum is one product of int8 matrices whose
    inner dimension is n r, n = ceil(min(out, in) / r).
    """

    name: ClassVar[str] = "randlora"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.00987"
    rank: int = 32
    basis: Literal["sign", "ternary"] = "sign"
    sparsity: int = 0
    """s of the ternary basis: one entry in s is not zero; 0 for the sign basis."""

    def shared(self) -> tuple[Group, ...]:
        return ()

    def groups(self, target: Target) -> tuple[Group, ...]:
        small = min(target.matrix)
        n = -(-small // self.rank)
        return Group(name="lambda", shape=(n, self.rank)), Group(name="gamma", shape=(n, small))

    def left(self, q: Coefficients, target: Target, stream: Stream, rows: range) -> Ints:
        """B diag(lambda), int8 (rows, r n); where out < in, the transposed other factor."""
        out, in_ = target.matrix
        if out < in_:
            return self._small_side(q, stream, rows).transpose(1, 0, 2).reshape(len(rows), -1)
        return self._large_side(q, stream, rows).reshape(len(rows), -1)

    def right(self, q: Coefficients, target: Target, stream: Stream) -> Ints:
        """A diag(gamma), int8 (r n, in); where out < in, the transposed other factor."""
        out, in_ = target.matrix
        if out < in_:
            return np.ascontiguousarray(self._large_side(q, stream, range(in_)).reshape(in_, -1).T)
        side = self._small_side(q, stream, range(in_))
        return np.ascontiguousarray(side.transpose(0, 2, 1)).reshape(-1, in_)

    def _large_side(self, q: Coefficients, stream: Stream, rows: range) -> Ints:
        """lambda_j[rho] B_j[row, rho], (rows, r, n)."""
        return self._draw(stream, Role.RANDLORA_B, q["lambda"], rows, range(self.rank))

    def _small_side(self, q: Coefficients, stream: Stream, columns: range) -> Ints:
        """A[rho, column] gamma_j[column], (r, columns, n)."""
        one = np.ones((1, columns.stop), np.int8)
        drawn = self._draw(stream, Role.RANDLORA_A, one, range(self.rank), columns)
        gamma = q["gamma"][:, columns.start : columns.stop].T
        found: Ints = drawn * gamma[None, :, :]
        return found

    def _draw(self, stream: Stream, role: int, values: Ints, rows: range, columns: range) -> Ints:
        if self.basis == "ternary":
            return stream.ternary(role, self.sparsity, values, rows, columns)
        return stream.signs(role, values, rows, columns)

    def bound(self, q: Coefficients) -> int:
        per_base = magnitude(q["lambda"]).sum(axis=1)[:, None] * magnitude(q["gamma"])
        return int(per_base.sum(axis=0).max())

    def scales(self) -> tuple[str, ...]:
        return "lambda", "gamma"
