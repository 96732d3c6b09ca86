"""VeRA in torch: two sign matrices that all targets share, scaled by two vectors per target.

Source: Kopiczko et al., https://arxiv.org/abs/2310.11454
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt

import torch
from torch import Tensor

from kilodelta.compress.training.factors import CoefficientValues, TrainableFactors
from kilodelta.compress.training.packed import PerDevice
from kilodelta.compress.training.trainables import Start
from kilodelta.compress.training.update import FactoredUpdate
from kilodelta.format.methods.base import Method
from kilodelta.format.methods.vera.spec import ROLE_A, ROLE_B
from kilodelta.format.targets import Target


class VeraFactors(TrainableFactors):
    """update = diag(b) B diag(lambda) A, A (r, in) and B (out, r)."""

    def __init__(self, method: Method, seed: int, targets: Sequence[Target]) -> None:
        super().__init__(method, seed, targets)
        self._A = PerDevice(self._draw_A)
        self._B = PerDevice(self._draw_B)

    def _draw_A(self) -> Tensor:  # noqa: N802
        width = max(target.matrix[1] for target in self.targets)
        drawn = self.stream.sign(ROLE_A, 0, range(self.method.rank), range(width))
        return torch.from_numpy(drawn).float().t().contiguous()

    def _draw_B(self) -> Tensor:  # noqa: N802
        height = max(target.matrix[0] for target in self.targets)
        drawn = self.stream.sign(ROLE_B, 0, range(height), range(self.method.rank))
        return torch.from_numpy(drawn).float()

    @property
    def constants(self) -> Sequence[PerDevice]:
        return self._A, self._B

    def start(self, target: Target, generator: torch.Generator) -> Mapping[str, Start]:
        """Start lambda 0.1 and b zero, with kaiming's deviations for A and B, as in PEFT."""
        out, in_ = target.matrix
        rank = self.method.rank
        return {
            "lambda": Start(values=torch.full((rank,), 0.1), gain=sqrt(2 / in_)),
            "b": Start(values=torch.zeros(out), gain=sqrt(2 / rank)),
        }

    def update(
        self, prepared: tuple[Tensor, ...], values: CoefficientValues, index: int
    ) -> FactoredUpdate:
        out, in_ = self.targets[index].matrix
        b, lambda_ = values.of(index, "b"), values.of(index, "lambda")
        B, A = self._B.on(b.device)[:out], self._A.on(b.device)[:in_]
        return FactoredUpdate(left=B, right=A, inner=lambda_, rows=b)
