"""What a device must be able to do: draw the factors of an update, and add their product.

Two units do it, and equal each other and the CPU bit for bit: Triton kernels
(`kilodelta.merging.gpu.on_triton`), and torch operations where Triton is missing or on a CPU
(`kilodelta.merging.gpu.on_torch`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kilodelta.exact import bounds
from kilodelta.exact.bases import Ints, Stream
from kilodelta.files.dtypes import PRECISIONS

Draw = Callable[[range], Tensor]
"""From a range of lines to their part of a factor: integers (rank, lines), or int8
(lines, width) for RandLoRA. Lines are the rows or the columns of the weights."""


@dataclass(frozen=True, kw_only=True)
class Bases:
    """The bases of a role under a seed; a line is a row of each basis, or a column."""

    stream: Stream
    role: int
    lines_are_rows: bool


@dataclass(frozen=True, kw_only=True)
class UpdateScale:
    """The scale 2^e * C of an update 2^e * C * dQ, every sum in dQ at most `bound` in magnitude."""

    c: int
    e: int
    bound: int

    @property
    def unit(self) -> float:
        """2^e; 1 for an update of zero, whose e may be any."""
        return bounds.unit(self.bound, self.e)


class Unit(Protocol):
    """One device with its kernels."""

    name: str
    device: torch.device

    def mixed(self, bases: Bases, q: Ints, rank: int) -> Draw:
        """Draw sum_i q_i S_i over sign bases; sum |q| is below 2^31."""

    def signed(self, bases: Bases, over_rank: Ints, over_lines: Ints) -> Draw:
        """Draw over_rank[rho] over_lines[line] S_0[line, rho]."""

    def picked(
        self,
        bases: Bases,
        theta: Ints,
        index: int,
        rank: int,
        *,
        anchor: int = 0,
        anchor_role: int = 0,
    ) -> Draw:
        """Draw signed picks from theta, plus `anchor` times sign basis 0 of another role.

        Args:
            bases: where the picks come from.
            theta: integers (k,).
            index: the target's position among the targets.
            rank: entries of each line.
            anchor: the multiple; 0 for none.
            anchor_role: the other role, whose rows are the ranks.
        """

    def held(self, factor: Ints) -> Draw:
        """Copy a factor (rank, lines) that the CPU has computed; entries are below 2^31."""

    def large(self, bases: Bases, lambda_: Ints, sparsity: int) -> Draw:
        """Draw RandLoRA's lambda_j[rho] B_j[line, rho].

        Args:
            bases: where B comes from.
            lambda_: integers (n, rank).
            sparsity: of the ternary basis; 0 for signs.
        """

    def small(self, bases: Bases, gamma: Ints, rank: int, sparsity: int) -> Draw:
        """Draw RandLoRA's A[rho, line] gamma_j[line].

        Args:
            bases: where A comes from.
            gamma: integers (n, all lines).
            rank: rows of A.
            sparsity: of the ternary basis; 0 for signs.
        """

    def add(
        self, weights: Tensor, left: Tensor, right: Tensor, scale: UpdateScale
    ) -> tuple[Tensor, Tensor]:
        """Merge: new weights (rows, columns), and a flag (1,), not zero where one is not finite.

        Args:
            weights: contiguous float32, float16 or bfloat16 (rows, columns).
            left: the rows' factor, of a `Draw`.
            right: the columns' factor.
            scale: what their product is multiplied by.
        """


DTYPES = {getattr(torch, row.long): row.name for row in PRECISIONS.values()}
"""torch's types of weights to safetensors names."""

TORCH = {name: dtype for dtype, name in DTYPES.items()}
"""safetensors names to torch's types of weights."""
