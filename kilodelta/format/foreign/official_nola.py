"""Rebuild the official NOLA code's layers: uniform bases drawn by PyTorch on a CPU, around starts.

Source: Koohpayegani et al., https://arxiv.org/abs/2310.02556, as its authors' GPT-2 and LLaMA code
computes it: each factor has a frozen start, which the paper's formula has not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from types import MappingProxyType
from typing import ClassVar, Literal

import numpy as np

from kilodelta.exact.bases import Stream
from kilodelta.format.fields import BASES, RANK, Check, one_of
from kilodelta.format.foreign.base import ALPHA, Compat, Floats, Values, require_print
from kilodelta.format.foreign.torch_cpu import TorchCpu
from kilodelta.format.packing import Group
from kilodelta.format.targets import Target

CHUNK = 1 << 22
"""Numbers drawn at a time."""


@dataclass(frozen=True, kw_only=True)
class OfficialNola(Compat):
    """dW = (alpha / r) (B0 + sum_j beta_j V_j / sqrt k) (A0 + sum_i alpha_i U_i / sqrt k).

    With the layout `gpt2`, a target with out = 3 in is GPT-2's fused query, key and value: two such
    updates, of its first and its last third.
    """

    name: ClassVar[str] = "official-nola"
    paper: ClassVar[str] = "https://arxiv.org/abs/2310.02556"
    checks: ClassVar[Mapping[str, Check]] = MappingProxyType(
        {
            "rank": RANK,
            "bases": BASES,
            "alpha": ALPHA,
            "layout": one_of("plain", "gpt2"),
            "start": one_of("A", "both"),
        }
    )
    rank: int
    bases: int
    alpha: float
    layout: Literal["plain", "gpt2"]
    start: Literal["A", "both"]
    """Which factors have a start; B0 is zero with `A`."""

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def parts(self, target: Target) -> tuple[range, ...]:
        """Return the rows of the target that are updated, one range per update."""
        out, in_ = target.matrix
        if self.layout == "gpt2" and out == 3 * in_:
            return range(in_), range(2 * in_, out)
        return (range(out),)

    def groups(self, target: Target) -> tuple[Group, ...]:
        parts = self.parts(target)
        count, height = len(parts), len(parts[0])
        B0 = Group(name="B0", shape=(count, height, self.rank))
        return (
            Group(name="seeds", shape=(count, 2), dtype="I64"),
            Group(name="prints", shape=(count, 2, 32), dtype="U8"),
            Group(name="alpha", shape=(count, self.bases)),
            Group(name="beta", shape=(count, self.bases)),
            Group(name="A0", shape=(count, self.rank, target.matrix[1])),
            *((B0,) if self.start == "both" else ()),
        )

    def inner(self, target: Target) -> int:
        return len(self.parts(target)) * self.rank

    def draws(self, target: Target) -> int:
        parts = self.parts(target)
        return len(parts) * self.rank * self.bases * (len(parts[0]) + target.matrix[1])

    def left(self, q: Values, target: Target, stream: Stream, rows: range) -> Floats:
        parts = self.parts(target)
        whole = np.zeros((target.matrix[0], len(parts) * self.rank), np.float32)
        for p, span in enumerate(parts):
            B0 = q["B0"][p] if self.start == "both" else np.zeros((len(span), self.rank))
            B = mixed(q["beta"][p], int(q["seeds"][p, 1]), B0, q["prints"][p, 1])
            whole[span.start : span.stop, p * self.rank : (p + 1) * self.rank] = B
        return whole[rows.start : rows.stop]

    def right(self, q: Values, target: Target, stream: Stream) -> Floats:
        return np.concatenate(
            [
                mixed(q["alpha"][p], int(q["seeds"][p, 0]), q["A0"][p], q["prints"][p, 0])
                for p in range(len(self.parts(target)))
            ]
        )


def mixed(coefficients: Floats, seed: int, start: Floats, fingerprint: Floats) -> Floats:
    """Compute start + sum_i c_i U_i / sqrt k, the basis checked against its SHA-256.

    The sum runs in the order of the bases, in float64, in which every product of two float32 is
    exact; the result is rounded to float32 once.

    Args:
        coefficients: float32 (k,).
        seed: of the basis.
        start: what is added, of the factor's shape.
        fingerprint: SHA-256 of the basis, uint8 (32,).

    Raises:
        SelfTestError: the basis drawn here is not the one that the file was made with.
    """
    total, drawn = mix(coefficients, seed, start.shape)
    require_print(fingerprint.tobytes().hex(), drawn.hex(), f"the basis of seed {seed}")
    scaled = total * (1.0 / sqrt(len(coefficients)))
    whole: Floats = (scaled + start).astype(np.float32)
    return whole


def mix(coefficients: Floats, seed: int, shape: tuple[int, ...]) -> tuple[Floats, bytes]:
    """Compute (sum_i c_i U_i, SHA-256 of all U), U_i uniform(-1, 1), drawn as PyTorch does."""
    generator, state = TorchCpu(seed), hashlib.sha256()
    total = np.zeros(shape)
    step = max(1, CHUNK // total.size)
    for first in range(0, len(coefficients), step):
        part = coefficients[first : first + step].astype(np.float64)
        drawn = generator.uniform((len(part), *shape), 1.0, "F32")
        state.update(np.ascontiguousarray(drawn, dtype="<f4").data)
        for c, U in zip(part, drawn, strict=True):
            total += c * U.astype(np.float64)
    return total, state.digest()
