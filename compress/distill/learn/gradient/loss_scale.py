"""Scale the loss of a training in float16, so that small gradients do not round to zero.

Float16 holds nothing below 6e-8, and gradients of activations are often smaller. So the loss is
multiplied by a power of two, which shifts them into the range, and the coefficients' gradients are
divided by it again. Where one overflows, its step is left out and the factor halved; after many
steps without that it is doubled (dynamic loss scaling; Micikevicius et al., arXiv 1710.03740).
Powers of two round nothing, so a step that is taken is the step of the unscaled loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FIRST = 2.0**16
"""The scale to begin with: the usual one, and soon lower where it is too large."""
GROWS_AFTER = 2000
"""Steps without an overflow after which the scale is doubled."""
SMALLEST = 2.0**-14
"""A scale at which an overflow is none of the scale's."""


@dataclass
class LossScale:
    """By what a loss is multiplied; 1, and never changed, where nothing computes in float16.

    Attributes:
        scale: the factor, a power of two.
        since: steps since it was changed last.
        active: whether it is used at all.
    """

    scale: float = 1.0
    since: int = 0
    active: bool = False

    @classmethod
    def for_types(cls, dtypes: Iterable[torch.dtype]) -> LossScale:
        """Return the scale for a model of these types.

        Example:
            >>> LossScale.for_types([torch.float32]).active
            False
            >>> LossScale.for_types([torch.float16]).scale
            65536.0
        """
        active = torch.float16 in set(dtypes)
        return cls(scale=FIRST if active else 1.0, active=active)

    def accepts(self, gradients: Sequence[Tensor]) -> bool:
        """Undo the scale in float32 gradients, in place, and adapt it to what they are.

        Returns:
            Whether all are finite, so that the step may be taken. Where this is False and the
            scale is at its smallest, the gradient itself is not finite.
        """
        if not self.active:
            return True
        for gradient in gradients:
            gradient.mul_(1 / self.scale)
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            self.scale, self.since = max(SMALLEST, self.scale / 2), 0
            return False
        self.since += 1
        if self.since >= GROWS_AFTER:
            self.scale, self.since = self.scale * 2, 0
        return True

    def state(self) -> dict[str, float | bool]:
        """Return everything for a training checkpoint."""
        return dict(self.__dict__)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> LossScale:
        """Read what `state` returned."""
        return cls(**state)
