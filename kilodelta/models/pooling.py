"""Pool token states into one sentence embedding per row, as sentence-transformers does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """Turn token states (batch, tokens, width) into one embedding (batch, width)."""

    mode: Literal["mean", "cls", "lasttoken"]
    normalise: bool

    def __call__(self, states: Tensor, mask: Tensor) -> Tensor:
        """Pool `states` where `mask` (batch, tokens) is 1; padding has 0.

        The mean and the norm are computed in float32 in every precision, as sentence-transformers
        does: the smallest norm that it allows is below float16's smallest number.

        Example:
            >>> pool = Pooling(mode="mean", normalise=False)
            >>> pool(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]]))
            tensor([[2.]])
        """
        pooled = _POOL[self.mode](states, mask)
        if not self.normalise:
            return pooled
        return nn.functional.normalize(pooled.float(), dim=-1).to(pooled.dtype)


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).float()
    summed = (states.float() * weights).sum(1)
    return (summed / weights.sum(1).clamp(min=1.0)).to(states.dtype)


def _cls(states: Tensor, mask: Tensor) -> Tensor:
    return states[:, 0]


def _last(states: Tensor, mask: Tensor) -> Tensor:
    places = torch.arange(mask.shape[1], device=mask.device)
    last = (places * mask).argmax(1)
    return states.gather(1, last[:, None, None].expand(-1, 1, states.shape[2]))[:, 0]


_POOL = {"mean": _mean, "cls": _cls, "lasttoken": _last}
