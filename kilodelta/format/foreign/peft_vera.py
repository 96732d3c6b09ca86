"""Rebuild HF PEFT's VeRA: two float matrices shared by all layers, two trained vectors per layer.

Source: Kopiczko et al., https://arxiv.org/abs/2310.11454, as HF PEFT 0.21 computes it.
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
from kilodelta.format.fields import RANK, SIDE, Check, one_of
from kilodelta.format.foreign.base import FINGERPRINT, Compat, Floats, Values, require_print
from kilodelta.format.foreign.torch_cpu import TorchCpu
from kilodelta.format.packing import Group
from kilodelta.format.targets import Target

Basis = tuple[Floats, Floats]
"""A (r, width) and B (height, r), float32."""


@dataclass(frozen=True, kw_only=True)
class PeftVera(Compat):
    """dW = diag(b) B diag(d) A, with the first rows of B and the first columns of A."""

    name: ClassVar[str] = "peft-vera"
    paper: ClassVar[str] = "https://arxiv.org/abs/2310.11454"
    checks: ClassVar[Mapping[str, Check]] = MappingProxyType(
        {
            "rank": RANK,
            "basis": one_of("drawn", "stored"),
            "height": SIDE,
            "width": SIDE,
            "fingerprint": FINGERPRINT,
        }
    )
    rank: int
    basis: Literal["drawn", "stored"]
    height: int
    """The largest out of all layers."""
    width: int
    """The largest in of all layers."""
    fingerprint: str
    """SHA-256 of A's and B's bytes, float32."""

    @property
    def scaling(self) -> float:
        return 1.0

    def shared(self) -> tuple[Group, ...]:
        """Return the basis, where no recipe rebuilds it."""
        if self.basis == "drawn":
            return ()
        return (
            Group(name="A", shape=(self.rank, self.width), dtype="F32"),
            Group(name="B", shape=(self.height, self.rank), dtype="F32"),
        )

    def groups(self, target: Target) -> tuple[Group, ...]:
        return (
            Group(name="d", shape=(self.rank,)),
            Group(name="b", shape=(target.matrix[0],)),
        )

    def draws(self, target: Target) -> int:
        """Count the basis, which is drawn once for all targets, at each."""
        return self.rank * (self.height + self.width)

    def problem(self, layout: tuple[Target, ...]) -> str:
        """Check that a drawn basis has the layers' size: a file cannot ask for a larger one."""
        height, width = (max(target.matrix[axis] for target in layout) for axis in (0, 1))
        if self.basis == "drawn":
            fits = (height, width) == (self.height, self.width)
        else:
            fits = height <= self.height and width <= self.width
        if fits:
            return ""
        return f"its basis is for {self.height} x {self.width}, the base's need {height} x {width}"

    def left(self, q: Values, target: Target, stream: Stream, rows: range) -> Floats:
        part = slice(rows.start, rows.stop)
        left: Floats = q["b"][part, None] * self._basis(q, stream)[1][part]
        return left

    def right(self, q: Values, target: Target, stream: Stream) -> Floats:
        right: Floats = q["d"][:, None] * self._basis(q, stream)[0][:, : target.matrix[1]]
        return right

    def _basis(self, q: Values, stream: Stream) -> Basis:
        if self.basis == "stored":
            require_print(self.fingerprint, digest((q["A"], q["B"])), "the basis")
            return q["A"], q["B"]
        return _rebuilt(self, stream.seed)


@lru_cache(maxsize=2)
def _rebuilt(form: PeftVera, seed: int) -> Basis:
    basis = draw(seed, form.rank, form.height, form.width)
    require_print(form.fingerprint, digest(basis), "PEFT's VeRA basis")
    return basis


def digest(basis: Basis) -> str:
    """Compute SHA-256 of a basis, A first."""
    state = hashlib.sha256()
    for part in basis:
        state.update(np.ascontiguousarray(part, "<f4").data)
    return "sha256:" + state.hexdigest()


def draw(seed: int, rank: int, height: int, width: int) -> Basis:
    """Draw PEFT's basis of `projection_prng_key = seed`: kaiming uniform, A first.

    Args:
        seed: PEFT's key.
        rank: r.
        height, width: rows of B, columns of A.
    """
    generator = TorchCpu(seed)
    A = generator.uniform((rank, width), _bound(width), "F32")
    return A, generator.uniform((height, rank), _bound(rank), "F32")


def _bound(fan_in: int) -> float:
    return sqrt(3.0) * (sqrt(2.0) / sqrt(fan_in))
