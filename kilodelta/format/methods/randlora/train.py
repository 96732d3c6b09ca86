"""RandLoRA in torch: n = ceil(min(out, in) / r) random products as one.

sum_j B_j diag(lambda_j) A diag(gamma_j) is the product of the B_j side by side, (M, n r), with the
diag(lambda_j) A diag(gamma_j) one below the other, (n r, m): about as much work as one dense layer.

Source: Albert et al., https://arxiv.org/abs/2502.00987
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kilodelta.compress.training.factors import CoefficientValues, TrainableFactors
from kilodelta.compress.training.packed import PerDevice
from kilodelta.compress.training.trainables import Start
from kilodelta.compress.training.update import FactoredUpdate
from kilodelta.format.methods.base import Method
from kilodelta.format.methods.randlora.spec import ROLE_A, ROLE_B
from kilodelta.format.targets import Target

GAIN = 20.0
"""Gain on lambda: the factor by which the paper scales the update, so that LoRA's rates fit."""


class RandLoraFactors(TrainableFactors):
    """update = B_j side by side (M, n r) times the scaled A (n r, m); transposed where out < in."""

    def __init__(self, method: Method, seed: int, targets: Sequence[Target]) -> None:
        super().__init__(method, seed, targets)
        self._A = PerDevice(self._draw_A)
        self._B = PerDevice(self._draw_B)

    def _draw_A(self) -> Tensor:  # noqa: N802
        """Draw A^T, float32 (m, r)."""
        small = max(min(target.matrix) for target in self.targets)
        one = np.ones((1, small), np.int8)
        drawn = self.method.draw(self.stream, ROLE_A, one, range(self.method.rank), range(small))
        return torch.from_numpy(drawn[:, :, 0]).float().t().contiguous()

    def _draw_B(self) -> Tensor:  # noqa: N802
        """Draw all B_j side by side, float32 (M, n r): a smaller target uses the first columns."""
        rank = self.method.rank
        large = max(max(target.matrix) for target in self.targets)
        n = max(-(-min(target.matrix) // rank) for target in self.targets)
        ones = np.ones((n, rank), np.int8)
        drawn = self.method.draw(self.stream, ROLE_B, ones, range(large), range(rank))
        return torch.from_numpy(drawn).permute(0, 2, 1).float().reshape(large, n * rank)

    @property
    def constants(self) -> Sequence[PerDevice]:
        return self._A, self._B

    def start(self, target: Target, generator: torch.Generator) -> Mapping[str, Start]:
        """Start lambda zero and gamma 1 / m, as in the paper's code."""
        small = min(target.matrix)
        n = -(-small // self.method.rank)
        return {
            "lambda": Start(values=torch.zeros(n, self.method.rank), gain=GAIN),
            "gamma": Start(values=torch.full((n, small), 1 / small)),
        }

    def update(
        self, prepared: tuple[Tensor, ...], values: CoefficientValues, index: int
    ) -> FactoredUpdate:
        out, in_ = self.targets[index].matrix
        lambda_, gamma = values.of(index, "lambda"), values.of(index, "gamma")
        n, small = gamma.shape
        A = self._A.on(gamma.device)[:small]
        B = self._B.on(gamma.device)[: max(out, in_), : n * self.method.rank]
        scaled: Tensor = Fold.apply(lambda_, gamma, A)  # type: ignore[no-untyped-call]
        return (
            FactoredUpdate(left=scaled, right=B)
            if out < in_
            else FactoredUpdate(left=B, right=scaled)
        )


class Fold(torch.autograd.Function):
    """A[x, rho] lambda[j, rho] gamma[j, x] as (m, n r).

    autograd alone would keep two tensors of the size of the result for the backward pass; this
    keeps lambda, gamma and A, and computes them again.
    """

    @staticmethod
    def forward(ctx: Any, lambda_: Tensor, gamma: Tensor, A: Tensor) -> Tensor:
        """Compute the product, (m, n r).

        Args:
            ctx: of autograd; keeps the three factors.
            lambda_: (n, r).
            gamma: (n, m).
            A: (m, r).
        """
        ctx.save_for_backward(lambda_, gamma, A)
        return ((A[:, None, :] * gamma.t()[:, :, None]) * lambda_).flatten(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """Compute the gradients to lambda (n, r) and gamma (n, m)."""
        lambda_, gamma, A = ctx.saved_tensors
        per_entry = gradient.reshape(len(A), *lambda_.shape) * A[:, None, :]
        for_lambda = (per_entry * gamma.t()[:, :, None]).sum(dim=0)
        for_gamma = (per_entry * lambda_).sum(dim=2).t()
        return for_lambda, for_gamma, None
