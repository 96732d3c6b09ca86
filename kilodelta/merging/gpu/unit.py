"""What a device must be able to do: draw the factors of an update, and add their product.

Two units do it, and equal each other and the CPU bit for bit: Triton kernels
(`kilodelta.merging.gpu.on_triton`), and torch operations where Triton is missing or on a CPU
(`kilodelta.merging.gpu.on_torch`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ldexp
from typing import Protocol

import torch
from torch import Tensor

from kilodelta.exact.bases import Ints, Stream

Draw = Callable[[range], Tensor]
"""From a range of lines to their part of a factor: integers (rank, lines), or int8
(lines, width) for RandLoRA. Lines are the rows or the columns of the weights."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A role's bases under a seed; a line is a row of the basis, or a column."""

    stream: Stream
    role: int
    lines_are_rows: bool


@dataclass(frozen=True, kw_only=True)
class Step:
    """An update 2^e * C * dQ, every sum in dQ at most `bound` in magnitude."""

    c: int
    e: int
    bound: int

    @property
    def scale(self) -> float:
        """2^e; an update of zero may have any e."""
        return ldexp(1.0, max(self.e, -149))


class Unit(Protocol):
    """One device with its kernels."""

    name: str
    device: torch.device

    def mixed(self, place: Place, q: Ints, rank: int) -> Draw:
        """sum_i q_i S_i over sign bases; sum |q| below 2^31."""

    def signed(self, place: Place, over_rank: Ints, over_lines: Ints) -> Draw:
        """over_rank[rho] over_lines[line] S_0[line, rho]."""

    def picked(self, place: Place, theta: Ints, index: int, rank: int, anchor: int = 0) -> Draw:
        """Signed picks from theta for target `index`, plus `anchor` times S_0 of the anchor."""

    def held(self, factor: Ints) -> Draw:
        """A factor (rank, lines) that is there already."""

    def large(self, place: Place, lambda_: Ints, sparsity: int) -> Draw:
        """RandLoRA's lambda_j[rho] B_j[line, rho], lambda (n, rank); sparsity 0 for signs."""

    def small(self, place: Place, gamma: Ints, rank: int, sparsity: int) -> Draw:
        """RandLoRA's A[rho, line] gamma_j[line], gamma (n, all lines)."""

    def add(
        self, weights: Tensor, left: Tensor, right: Tensor, step: Step
    ) -> tuple[Tensor, Tensor]:
        """New weights (rows, columns), and a flag (1,) that is not zero where one is not finite.

        Args:
            weights: contiguous float32, float16 or bfloat16 (rows, columns).
            left: the rows' factor, of a `Draw`.
            right: the columns' factor.
        """


DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""torch's types of weights to safetensors names."""

TORCH = {name: dtype for dtype, name in DTYPES.items()}
"""And back."""
