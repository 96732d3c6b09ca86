"""Train through the rounding of a merge in the grid: forward on it, gradient straight through.

A merge in the grid keeps a quantised weight's steps and moves its codes (docs/format.md, section
10). A forward pass computes with the weight as such a merge leaves it, in float32; the backward
pass treats the rounding as the identity (straight-through estimator: Bengio et al.,
https://arxiv.org/abs/1308.3432). What a file keeps is measured by the exact merge afterwards: here
a float32 quotient may fall on the other side of a tie.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kilodelta.grid.matrix import Matrix

E4M3_LARGEST = torch.finfo(torch.float8_e4m3fn).max
E2M1_LARGEST = 6.0


@dataclass(frozen=True, kw_only=True, eq=False)
class TargetGrid:
    """The grid of one quantised weight (out, in), as tensors that broadcast against `shape`.

    Attributes:
        kind: the name of the kind of codes, `int4`, `e2m1`, ...
        shape: the weight's, or (row blocks, rows, groups, columns) where all blocks are whole.
        steps: float32; `inverses` is 1 / steps, and 0 for a step of zero.
        low, high: float32, what a code less its zero point is clamped to; integers only.
        minima: float32, or None.
        still: whether a step is zero.
    """

    kind: str
    shape: tuple[int, ...]
    steps: Tensor
    inverses: Tensor
    low: Tensor
    high: Tensor
    minima: Tensor | None
    still: bool

    @classmethod
    def of(cls, matrix: Matrix, device: torch.device | str = "cpu") -> TargetGrid:
        """Take the grid of a matrix.

        Args:
            matrix: whose.
            device: where the weight lies.
        """
        tall, wide = matrix.steps.shape
        blocks = (tall, matrix.block[0], wide, matrix.block[1])
        whole = matrix.order is None and (blocks[0] * blocks[1], blocks[2] * blocks[3]) == (
            matrix.shape
        )

        def floats(values: Any) -> Tensor:
            # One value per block; per weight where a block is cut off, or columns are in any order.
            spread = np.asarray(values)[:, None, :, None] if whole else matrix.spread(values)
            return torch.from_numpy(spread.astype(np.float32)).to(device)

        steps, zeros = matrix.steps, matrix.zeros
        if zeros is None:
            zeros = np.zeros(steps.shape, np.int16)
        return cls(
            kind=matrix.kind.name,
            shape=blocks if whole else matrix.shape,
            steps=floats(steps),
            inverses=floats(np.divide(1.0, steps, out=np.zeros_like(steps), where=steps != 0)),
            low=floats(matrix.kind.low - zeros.astype(np.int64)),
            high=floats(matrix.kind.high - zeros.astype(np.int64)),
            minima=None if matrix.minima is None else floats(matrix.minima),
            still=bool(matrix.still),
        )

    @property
    def spacing(self) -> float:
        """The mean distance of two neighbouring numbers near zero."""
        apart = {"e4m3": 2.0**-9, "e2m1": 0.5}.get(self.kind, 1.0)
        return apart * float(self.steps.abs().mean())

    def merged(self, weight: Tensor, change: Tensor) -> Tensor:
        """Add a change to the weight and round to the grid; the gradient goes to `change` as it is.

        Args:
            weight: the base's values, (out, in), on the grid.
            change: float32 of the same shape.

        Returns:
            float32 (out, in).

        Example:
            >>> from kilodelta.grid.codes import integer_kind
            >>> codes = np.array([[1, 7]], np.int8)
            >>> w = Matrix(kind=integer_kind(4), codes=codes, steps=np.ones((1, 1)), block=(1, 2))
            >>> change = torch.tensor([[0.7, 5.0]], requires_grad=True)
            >>> out = TargetGrid.of(w).merged(torch.tensor([[1.0, 7.0]]), change)
            >>> out.tolist(), torch.autograd.grad(out.sum(), change)[0].tolist()
            ([[2.0, 7.0]], [[1.0, 1.0]])
        """
        merged: Tensor = _Merged.apply(change, weight, self)  # type: ignore[no-untyped-call]
        return merged

    def rounded(self, weight: Tensor, change: Tensor) -> Tensor:
        """Do what `merged` does, without a gradient."""
        total = (weight.float() + change).view(self.shape)
        moved = total if self.minima is None else total - self.minima
        numbers = self._nearest(moved * self.inverses).mul_(self.steps)
        if self.minima is not None:
            numbers += self.minima
        if self.still:  # no code can change these weights
            numbers = torch.where(self.steps == 0, weight.float().view(self.shape), numbers)
        return numbers.view(weight.shape)

    def _nearest(self, numbers: Tensor) -> Tensor:
        """Round to the kind's numbers, ties to even; `numbers` is overwritten."""
        if self.kind == "e4m3":
            return numbers.clamp_(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn).float()
        if self.kind == "e2m1":
            # The numbers are 0.5 apart below 2, 1 below 4 and 2 up to 6; an even multiple of that
            # distance has an even code.
            numbers.clamp_(-E2M1_LARGEST, E2M1_LARGEST)
            size = numbers.abs()
            apart = (size >= 2).float().add_(1.0).mul_(0.5).add_((size >= 4).float())
            return numbers.div_(apart).round_().mul_(apart)
        return numbers.round_().clamp_(self.low, self.high)


class _Merged(torch.autograd.Function):
    """`TargetGrid.rounded`, whose gradient is the identity."""

    @staticmethod
    def forward(ctx: Any, change: Tensor, weight: Tensor, grid: TargetGrid) -> Tensor:
        return grid.rounded(weight, change)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None, None


@dataclass(frozen=True, kw_only=True, eq=False)
class Way:
    """One way in which a delta will be applied, and for which it trains.

    Attributes:
        name: for people, such as `int4-g32` or `beside`.
        weights: by parameter, the values that it has this way (a quantised base's), in its type
            and on its device; the other parameters keep theirs.
        grids: by a target's index, the grid to which its merged weight is rounded; every other
            target is base plus update.
    """

    name: str
    weights: Mapping[nn.Parameter, Tensor] = field(default_factory=dict)
    grids: Mapping[int, TargetGrid] = field(default_factory=dict)


class Ways:
    """The ways that a delta trains for, and the one that a module computes in now."""

    def __init__(self, ways: tuple[Way, ...] = ()) -> None:
        self.all = ways
        self.now: Way | None = None
        self._own = {p: p.data for way in ways for p in way.weights}

    def at(self, step: int) -> Way | None:
        """Return the way that a step is computed in; None where there are none.

        Every other step goes through a grid, where there are grids and other ways: the others
        differ from each other by a base's rounding alone, and what teaches one teaches all of them.
        """
        through = [way for way in self.all if way.grids]
        others = [way for way in self.all if not way.grids]
        if through and others:
            chosen = others if step % 2 else through
            return chosen[step // 2 % len(chosen)]
        return self.all[step % len(self.all)] if self.all else None

    def take(self, way: Way | None) -> None:
        """Compute in a way from now on; None: with the module's own weights, and no grid."""
        given = {} if way is None else way.weights
        for parameter, own in self._own.items():
            parameter.data = given.get(parameter, own)
        self.now = way
