"""NOLA in torch: both factors are sums of sign bases, mixed for all targets at once.

Source: Koohpayegani et al., https://arxiv.org/abs/2310.02556
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt

import torch
from torch import Tensor

from kilodelta.compress.training.factors import CoefficientValues, TrainableFactors
from kilodelta.compress.training.packed import PerDevice, SignBases, SignMixer
from kilodelta.compress.training.trainables import Start
from kilodelta.compress.training.update import FactoredUpdate
from kilodelta.format.methods.base import Method
from kilodelta.format.methods.nola.spec import ROLE_A, ROLE_B
from kilodelta.format.targets import Target


class NolaFactors(TrainableFactors):
    """update = (sum_j beta_j V_j) (sum_i alpha_i U_i), V_j (out, r), U_i (r, in)."""

    def __init__(self, method: Method, seed: int, targets: Sequence[Target]) -> None:
        super().__init__(method, seed, targets)
        outs, ins = zip(*(target.matrix for target in targets), strict=True)
        self._left = self._mixer(ROLE_B, outs, lines_are_rows=True)
        self._right = self._mixer(ROLE_A, ins, lines_are_rows=False)

    def _mixer(self, role: int, lines: Sequence[int], *, lines_are_rows: bool) -> SignMixer:
        rank, bases = self.method.rank, self.method.bases
        signs = SignBases(
            self.stream,
            role,
            lines=max(lines),
            rank=rank,
            bases=bases,
            lines_are_rows=lines_are_rows,
        )
        return SignMixer(signs, lines, rank)

    @property
    def constants(self) -> Sequence[PerDevice]:
        return self._left.bases, self._right.bases

    def start(self, target: Target, generator: torch.Generator) -> Mapping[str, Start]:
        """Start alpha random, with which the right factor is as large as LoRA's A; beta zero."""
        k = self.method.bases
        deviation = 1 / sqrt(3 * target.matrix[1])
        return {
            "alpha": Start(
                values=torch.randn(k, generator=generator) * deviation, gain=1 / sqrt(k)
            ),
            "beta": Start(values=torch.zeros(k), gain=1 / sqrt(k)),
        }

    def prepare(self, values: CoefficientValues) -> tuple[Tensor, ...]:
        return self._left.mix(values.all("beta")), self._right.mix(values.all("alpha"))

    def update(
        self, prepared: tuple[Tensor, ...], values: CoefficientValues, index: int
    ) -> FactoredUpdate:
        left, right = prepared
        return FactoredUpdate(
            left=self._left.part(left, index), right=self._right.part(right, index)
        )
