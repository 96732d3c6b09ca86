"""The update of a matrix as a product of factors and diagonals, which a layer computes with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class FactoredUpdate:
    """diag(rows) left diag(inner) right^T; a diagonal that is None is the identity.

    A method with fixed factors whose coefficients are diagonals (VeRA) keeps them apart: a gradient
    to a scale of activations costs a sum, one to a scaled factor a matrix product.
    """

    left: Tensor
    """(out, K)."""
    right: Tensor
    """(in, K)."""
    inner: Tensor | None = None
    """(K,)."""
    rows: Tensor | None = None
    """(out,)."""

    def map(self, function: Callable[[Tensor], Tensor]) -> FactoredUpdate:
        """Return the same product of other tensors, each changed by a function."""
        inner = None if self.inner is None else function(self.inner)
        rows = None if self.rows is None else function(self.rows)
        return FactoredUpdate(
            left=function(self.left), right=function(self.right), inner=inner, rows=rows
        )

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return (out, K) and (in, K) with the diagonals folded in.

        The update is the first times the second transposed.
        """
        left = self.left if self.rows is None else self.left * self.rows[:, None]
        right = self.right if self.inner is None else self.right * self.inner
        return left, right

    def matrix(self) -> Tensor:
        """Compute the update itself, (out, in)."""
        left, right = self.pair()
        return left @ right.t()

    def add_to(self, total: Tensor, given: Tensor) -> Tensor:
        """Compute total (n, out) + given (n, in) right diag(inner) left^T diag(rows).

        Returns:
            The sum in total's type.
        """
        hidden = given @ self.right
        if self.inner is not None:
            hidden = hidden * self.inner.to(hidden.dtype)
        if self.rows is None:
            return total.addmm(hidden, self.left.t())
        return total.addcmul(hidden @ self.left.t(), self.rows.to(total.dtype))
