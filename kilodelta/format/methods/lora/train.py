"""LoRA in torch: the factors are the coefficients.

Source: Hu et al., https://arxiv.org/abs/2106.09685
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt

import torch
from torch import Tensor

from kilodelta.compress.training.factors import CoefficientValues, TrainableFactors, uniform
from kilodelta.compress.training.trainables import Start
from kilodelta.compress.training.update import FactoredUpdate
from kilodelta.format.targets import Target


class LoraFactors(TrainableFactors):
    """update = B A, A (r, in) and B (out, r)."""

    def start(self, target: Target, generator: torch.Generator) -> Mapping[str, Start]:
        """Start A kaiming uniform and B zero, as in the paper's code."""
        out, in_ = target.matrix
        rank = self.method.rank
        return {
            "A": Start(values=uniform(generator, (rank, in_), 1 / sqrt(in_))),
            "B": Start(values=torch.zeros(out, rank)),
        }

    def update(
        self, prepared: tuple[Tensor, ...], values: CoefficientValues, index: int
    ) -> FactoredUpdate:
        return FactoredUpdate(left=values.of(index, "B"), right=values.of(index, "A").t())
