"""Rebuild HF PEFT's RandLora: another pairing of bases and ranks than the paper's, and float bases.

Source: Albert et al., https://arxiv.org/abs/2502.00987, as HF PEFT 0.21 computes it; its sum pairs
rank-major scales with base-major columns, so it is not the paper's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from types import MappingProxyType
from typing import ClassVar, Literal

import numpy as np

from kilodelta.exact.bases import Stream
from kilodelta.files.dtypes import FLOATS, named
from kilodelta.format.fields import RANK, SIDE, Check, one_of
from kilodelta.format.foreign.base import (
    ALPHA,
    DTYPE,
    FINGERPRINT,
    Compat,
    Floats,
    Values,
    require_print,
)
from kilodelta.format.foreign.torch_cpu import TorchCpu
from kilodelta.format.packing import Group
from kilodelta.format.targets import Target

Kind = Literal["dense", "sparse", "very-sparse", "stored"]
Basis = tuple[Floats, Floats]
"""A (r, m) and B (M, n, r), float32."""


@dataclass(frozen=True, kw_only=True)
class PeftRandLora(Compat):
    """dW = (alpha / r) Bhat L, transposed where out < in.

    Bhat (M, n r) is B flattened base-major, L (r n, m) is lambda A gamma flattened rank-major.
    """

    name: ClassVar[str] = "peft-randlora"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.00987"
    checks: ClassVar[Mapping[str, Check]] = MappingProxyType(
        {
            "rank": RANK,
            "alpha": ALPHA,
            "basis": one_of("dense", "sparse", "very-sparse", "stored"),
            "dtype": DTYPE,
            "small": SIDE,
            "large": SIDE,
            "fingerprint": FINGERPRINT,
        }
    )
    full_rank: ClassVar[bool] = True
    rank: int
    alpha: float
    basis: Kind
    dtype: Literal["bfloat16", "float16", "float32"]
    """The type of the basis."""
    small: int
    """m of the largest layer, the width of A."""
    large: int
    """M of the largest layer, the height of B."""
    fingerprint: str
    """SHA-256 of A's and B's bytes in the basis's own type."""

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def shared(self) -> tuple[Group, ...]:
        """Return the basis, where no recipe rebuilds it."""
        if self.basis != "stored":
            return ()
        n, type_ = ceil_div(self.small, self.rank), named(self.dtype).name
        return (
            Group(name="A", shape=(self.rank, self.small), dtype=type_),
            Group(name="B", shape=(self.large, n, self.rank), dtype=type_),
        )

    def groups(self, target: Target) -> tuple[Group, ...]:
        small = min(target.matrix)
        n = ceil_div(small, self.rank)
        return Group(name="lambda", shape=(self.rank, n)), Group(name="gamma", shape=(n, small))

    def inner(self, target: Target) -> int:
        return ceil_div(min(target.matrix), self.rank) * self.rank

    def draws(self, target: Target) -> int:
        """Count the basis, which is drawn once for all targets, at each."""
        return (self.small + self.rank) * (self.large + self.rank)

    def problem(self, layout: tuple[Target, ...]) -> str:
        needed = sides(layout)
        if (self.small, self.large) == needed:
            return ""
        return f"its basis is for sides {self.small} and {self.large}, the base's are {needed}"

    def left(self, q: Values, target: Target, stream: Stream, rows: range) -> Floats:
        A, B = self._basis(q, stream)
        if target.matrix[0] < target.matrix[1]:
            return np.ascontiguousarray(self._scaled(A, q, rows).T)
        n = len(q["gamma"])
        return np.ascontiguousarray(B[rows.start : rows.stop, :n]).reshape(len(rows), -1)

    def right(self, q: Values, target: Target, stream: Stream) -> Floats:
        A, B = self._basis(q, stream)
        out, in_ = target.matrix
        if out >= in_:
            return self._scaled(A, q, range(in_))
        return np.ascontiguousarray(B[:in_, : len(q["gamma"])].reshape(in_, -1).T)

    def _scaled(self, A: Floats, q: Values, columns: range) -> Floats:
        """Compute L, the products rounded as PEFT rounds them, float32 (r n, columns)."""
        part = slice(columns.start, columns.stop)
        L: Floats = q["lambda"][:, :, None] * A[:, None, part] * q["gamma"][None, :, part]
        return L.reshape(-1, len(columns))

    def _basis(self, q: Values, stream: Stream) -> Basis:
        if self.basis == "stored":
            require_print(self.fingerprint, digest((q["A"], q["B"]), self.dtype), "the basis")
            return q["A"], q["B"]
        return _rebuilt(self, stream.seed)


@lru_cache(maxsize=2)
def _rebuilt(form: PeftRandLora, seed: int) -> Basis:
    basis = draw(form.basis, form.dtype, seed, form.rank, form.small, form.large)
    require_print(form.fingerprint, digest(basis, form.dtype), "PEFT's RandLora basis")
    return basis


def ceil_div(a: int, b: int) -> int:
    """Compute ceil(a / b)."""
    return -(-a // b)


def sides(layout: tuple[Target, ...]) -> tuple[int, int]:
    """Return (m, M) of PEFT's basis for these targets: the largest out and in, sorted."""
    out, in_ = (max(target.matrix[axis] for target in layout) for axis in (0, 1))
    return min(out, in_), max(out, in_)


def digest(basis: Basis, dtype: str) -> str:
    """Compute SHA-256 of a basis in its type, A first."""
    state = hashlib.sha256()
    for part in basis:
        state.update(named(dtype).narrow(part).data)
    return "sha256:" + state.hexdigest()


def draw(kind: str, dtype: str, seed: int, rank: int, small: int, large: int) -> Basis:
    """Draw PEFT's basis of `projection_prng_key = seed`.

    Args:
        kind: dense, sparse or very-sparse.
        dtype: the type in which it is drawn.
        seed: PEFT's key.
        rank: r.
        small, large: the basis's sides, as `sides` says.
    """
    generator, n = TorchCpu(seed), ceil_div(small, rank)
    if kind == "dense":
        return _dense(generator, named(dtype).name, rank, n, small, large)
    sparsity = 3.0 if kind == "sparse" else sqrt(small)
    return _sparse(generator.rand((rank, small)), sparsity), _sparse(
        generator.rand((large, n, rank)), sparsity
    )


def _dense(generator: TorchCpu, type_: str, rank: int, n: int, small: int, large: int) -> Basis:
    """Draw kaiming uniform (a = sqrt 5) in a narrow type, over its unbiased deviation."""
    A = generator.uniform((rank, small), _kaiming(small), type_)
    parts = [generator.uniform((large, rank), _kaiming(rank), type_) for _ in range(n)]
    B = np.stack(parts, axis=1)
    return _normal(A, type_), _normal(B, type_)


def _kaiming(fan_in: int) -> float:
    return sqrt(3.0) * (sqrt(2.0 / 6.0) / sqrt(fan_in))


def _normal(values: Floats, type_: str) -> Floats:
    deviation = np.std(values.astype(np.float64), ddof=1)
    divisor = FLOATS[type_].rounded(np.array([deviation]))[0]
    return FLOATS[type_].rounded(values / divisor)


def _sparse(units: Floats, sparsity: float) -> Floats:
    """Turn uniform numbers into -1, 0 and 1 by two thresholds, over their float32 deviation."""
    edge = 1 / (2 * sparsity)
    below, above = units < np.float32(edge), units > np.float32(1 - edge)
    signs = above.astype(np.float32) - below.astype(np.float32)
    deviation = np.float32(np.std(signs.astype(np.float64), ddof=1))
    scaled: Floats = signs / deviation
    return scaled
