"""Rebuild HF PEFT's Uni-LoRA: one float vector, dealt out to all layers by NumPy's shuffle.

Source: Li et al., https://arxiv.org/abs/2506.00799, as HF PEFT 0.21 computes it: every entry of the
vector is dealt out equally often, to one place more or less, and scaled by how often.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from kilodelta.exact.bases import Stream
from kilodelta.files.dtypes import named
from kilodelta.format.fields import BASES, RANK, Check, whole_in
from kilodelta.format.foreign.base import (
    DTYPE,
    FINGERPRINT,
    Compat,
    Floats,
    Values,
    require_print,
)
from kilodelta.format.packing import Group
from kilodelta.format.targets import Target

MAX_PLACES = 1 << 40
"""Most entries of all factors together."""

Dealt = tuple[npt.NDArray[Any], Floats]
"""Which entry every place takes, int64 (total,), and what each entry is scaled by, (k,)."""


@dataclass(frozen=True, kw_only=True)
class PeftUniLora(Compat):
    """dW = B A; A (r, in) and then B (out, r) take the next places from the target's `start`."""

    name: ClassVar[str] = "peft-unilora"
    paper: ClassVar[str] = "https://arxiv.org/abs/2506.00799"
    checks: ClassVar[Mapping[str, Check]] = MappingProxyType(
        {
            "rank": RANK,
            "bases": BASES,
            "total": whole_in(1, MAX_PLACES),
            "dtype": DTYPE,
            "fingerprint": FINGERPRINT,
        }
    )
    rank: int
    bases: int
    """Length of the vector, k."""
    total: int
    """Places of all layers together."""
    dtype: Literal["bfloat16", "float16", "float32"]
    """The type of the scales: that of the weights as they were loaded."""
    fingerprint: str
    """SHA-256 of the dealt indices, int64."""

    @property
    def scaling(self) -> float:
        return 1.0

    def shared(self) -> tuple[Group, ...]:
        return (Group(name="theta", shape=(self.bases,)),)

    def groups(self, target: Target) -> tuple[Group, ...]:
        return (Group(name="start", shape=(1,), dtype="I64"),)

    def draws(self, target: Target) -> int:
        """Count the target's share of the shuffle, which is drawn once for all."""
        return places(self.rank, [target.matrix])

    def problem(self, layout: tuple[Target, ...]) -> str:
        needed = places(self.rank, [target.matrix for target in layout])
        return "" if needed == self.total else f"it deals out {self.total} places of {needed}"

    def left(self, q: Values, target: Target, stream: Stream, rows: range) -> Floats:
        out, in_ = target.matrix
        part = self._dealt(q, stream, int(q["start"][0]) + self.rank * in_, (out, self.rank))
        return part[rows.start : rows.stop]

    def right(self, q: Values, target: Target, stream: Stream) -> Floats:
        return self._dealt(q, stream, int(q["start"][0]), (self.rank, target.matrix[1]))

    def _dealt(self, q: Values, stream: Stream, start: int, shape: tuple[int, int]) -> Floats:
        indices, scales = _rebuilt(self, stream.seed)
        chosen = indices[range_of(start, shape, self.total)].reshape(shape)
        factor: Floats = q["theta"][chosen] * scales[chosen]
        return factor


def range_of(start: int, shape: tuple[int, int], total: int) -> slice:
    """Return the places of a factor; a start that a file puts outside of all is moved inside."""
    size = shape[0] * shape[1]
    first = min(max(start, 0), total - size)
    return slice(first, first + size)


def places(rank: int, shapes: list[tuple[int, int]]) -> int:
    """Count the entries of all factors of a rank."""
    return sum(rank * (out + in_) for out, in_ in shapes)


@lru_cache(maxsize=2)
def _rebuilt(form: PeftUniLora, seed: int) -> Dealt:
    indices = deal(seed, form.bases, form.total)
    require_print(form.fingerprint, digest(indices), "NumPy's shuffle of Uni-LoRA's indices")
    return indices, scales_of(indices, form.bases, form.dtype)


def deal(seed: int, bases: int, total: int) -> npt.NDArray[Any]:
    """Deal out PEFT's indices of `proj_seed = seed`, int64 (total,)."""
    generator = np.random.default_rng(seed)
    indices = np.repeat(np.arange(bases), total // bases)
    if total % bases:
        rest = generator.choice(bases, total % bases, replace=False)
        indices = np.concatenate([indices, rest])
    generator.shuffle(indices)
    return indices


def scales_of(indices: npt.NDArray[Any], bases: int, dtype: str) -> Floats:
    """Compute 1 / sqrt of how often each entry is dealt out (0 for never), rounded to a type."""
    counts = np.bincount(indices, minlength=bases).astype(np.float32)
    scales = np.where(counts > 0, 1 / np.sqrt(np.maximum(counts, 1)), 0).astype(np.float32)
    return named(dtype).rounded(scales)


def digest(indices: npt.NDArray[Any]) -> str:
    """Compute SHA-256 of indices as little-endian int64."""
    return "sha256:" + hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()
