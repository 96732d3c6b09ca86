"""From a method's coefficients to the two factors of a target's update, on a unit.

One function a method, in the letters of docs/format.md, section 6: `out` draws the factor of the
rows of W (D, d), `in_` that of its columns, and dQ is their product over the rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kilodelta.exact.bases import Ints, Role, Stream
from kilodelta.format.methods import Coefficients, Lora, Method, Nola, RandLora, UniLora, Vera
from kilodelta.format.methods.base import magnitude
from kilodelta.format.targets import Target
from kilodelta.merging.gpu.unit import Draw, Place, Unit

MOST = 2**31 - 2**15
"""Where a group's magnitudes are cut: with one more number of 16 bits the sum is below 2^31."""


@dataclass(frozen=True, kw_only=True)
class Sides:
    """The factors of one target's update."""

    out: Draw
    in_: Draw

    def stored(self, target: Target) -> tuple[Draw, Draw]:
        """(of the rows, of the columns) of the tensor as it is stored."""
        return (self.in_, self.out) if target.transposed else (self.out, self.in_)


@dataclass(frozen=True)
class _Job:
    q: Coefficients
    target: Target
    stream: Stream
    unit: Unit

    def rows(self, role: Role) -> Place:
        return Place(stream=self.stream, role=role, lines_are_rows=True)

    def columns(self, role: Role) -> Place:
        return Place(stream=self.stream, role=role, lines_are_rows=False)


def sides(method: Method, q: Coefficients, target: Target, stream: Stream, unit: Unit) -> Sides:
    """The factors of a target's update."""
    return _SIDES[method.name](method, _Job(q, target, stream, unit))


def _nola(method: Nola, job: _Job) -> Sides:
    """Units sum in 31 bits. A larger sum comes in pieces, one beside the other in the rank, each
    with the other factor once more: B (A1 + A2) = [B B] [A1; A2]. By the format's bound, 2^53, one
    of the two factors is whole."""
    out = _pieces(job.rows(Role.NOLA_B), job.q["beta"], method, job.unit)
    in_ = _pieces(job.columns(Role.NOLA_A), job.q["alpha"], method, job.unit)
    return Sides(out=_beside(out, len(in_)), in_=_beside(in_, len(out)))


def _pieces(place: Place, q: Ints, method: Nola, unit: Unit) -> list[Draw]:
    """Draws that add up to a factor, each of coefficients whose magnitudes add up to less than
    2^31."""
    piece = np.cumsum(magnitude(q)) // MOST
    parts = (np.where(piece == number, q, np.zeros_like(q)) for number in np.unique(piece))
    return [unit.mixed(place, part, method.rank) for part in parts]


def _beside(draws: list[Draw], times: int) -> Draw:
    """Factors one below the other, so many times."""
    if len(draws) == times == 1:
        return draws[0]
    return lambda lines: torch.cat([draw(lines) for draw in draws]).repeat(times, 1)


def _randlora(method: RandLora, job: _Job) -> Sides:
    out, in_ = job.target.matrix
    large = job.unit.large(job.rows(Role.RANDLORA_B), job.q["lambda"], method.sparsity)
    small = job.unit.small(
        job.columns(Role.RANDLORA_A), job.q["gamma"], method.rank, method.sparsity
    )
    return Sides(out=small, in_=large) if out < in_ else Sides(out=large, in_=small)


def _lora(method: Lora, job: _Job) -> Sides:
    B: Ints = np.ascontiguousarray(job.q["B"].T)
    return Sides(out=job.unit.held(B), in_=job.unit.held(job.q["A"]))


def _vera(method: Vera, job: _Job) -> Sides:
    rank, width = np.ones(method.rank, np.int8), np.ones(job.target.matrix[1], np.int8)
    return Sides(
        out=job.unit.signed(job.rows(Role.VERA_B), job.q["lambda"], job.q["b"]),
        in_=job.unit.signed(job.columns(Role.VERA_A), rank, width),
    )


def _unilora(method: UniLora, job: _Job) -> Sides:
    theta, index = job.q["theta"], job.target.index
    right = job.columns(Role.UNILORA_U)
    return Sides(
        out=job.unit.picked(job.rows(Role.UNILORA_V), theta, index, method.rank),
        in_=job.unit.picked(right, theta, index, method.rank, method.anchor),
    )


_SIDES: dict[str, Callable[[Any, _Job], Sides]] = {
    "nola": _nola,
    "randlora": _randlora,
    "lora": _lora,
    "vera": _vera,
    "unilora": _unilora,
}
