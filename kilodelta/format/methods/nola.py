"""NOLA: a low-rank delta whose two factors are sums of seeded random sign matrices.

Source: Koohpayegani et al., https://arxiv.org/abs/2310.02556
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from kilodelta.exact.bases import Role, Stream
from kilodelta.format.coefficients import Group
from kilodelta.format.methods.base import Coefficients, Ints, magnitude
from kilodelta.format.targets import Target


@dataclass(frozen=True, kw_only=True)
class Nola:
    """dQ = (sum_j beta_j V_j) (sum_i alpha_i U_i), V_j (out, r) and U_i (r, in) sign bases."""

    name: ClassVar[str] = "nola"
    paper: ClassVar[str] = "https://arxiv.org/abs/2310.02556"
    rank: int = 8
    bases: int = 256
    """Matrices summed per factor, k in the paper."""
    basis: Literal["sign"] = "sign"

    def shared(self) -> tuple[Group, ...]:
        return ()

    def groups(self, target: Target) -> tuple[Group, ...]:
        return Group(name="alpha", shape=(self.bases,)), Group(name="beta", shape=(self.bases,))

    def left(self, q: Coefficients, target: Target, stream: Stream, rows: range) -> Ints:
        """sum_j beta_j V_j, int64 (rows, r)."""
        return stream.mix(Role.NOLA_B, q["beta"], rows, range(self.rank))

    def right(self, q: Coefficients, target: Target, stream: Stream) -> Ints:
        """sum_i alpha_i U_i, int64 (r, in)."""
        return stream.mix(Role.NOLA_A, q["alpha"], range(self.rank), range(target.matrix[1]))

    def bound(self, q: Coefficients) -> int:
        return self.rank * int(magnitude(q["alpha"]).sum()) * int(magnitude(q["beta"]).sum())

    def scales(self) -> tuple[str, ...]:
        return "alpha", "beta"
