"""Notice that a training goes astray, so that it begins again at a lower rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ASTRAY = 3.0
"""Times the loss of the first step, which is the base's, that a mean of recent losses may reach."""
SMOOTHED = 0.8
"""Weight of the past in the mean of recent losses: about the last five steps."""
PATIENCE = 5
"""Steps before which a mean says nothing."""
SLOWER = 4.0
"""Divides the rate when a training begins again."""
ATTEMPTS = 3
"""Times that a training may begin again."""
FULL_RATE_FROM = 100
"""Steps from which a training runs at the method's rate. With fewer the rate is lower in
proportion: there is no time to come back from where the first large steps lead."""


def rate_for(rate: float, steps: int) -> float:
    """Return a method's rate for a training of so many steps.

    Example:
        >>> rate_for(0.02, 800), rate_for(0.02, 10)
        (0.02, 0.002)
    """
    return rate * min(1.0, steps / FULL_RATE_FROM)


@dataclass
class Watch:
    """What a training's losses say.

    Attributes:
        first: the loss of the first step since the training began, or began again.
        recent: the mean of recent losses.
        seen: how many losses these are.
        again: how often the training has begun again.
    """

    first: float = math.nan
    recent: float = math.nan
    seen: int = 0
    again: int = 0

    def is_astray(self, loss: float) -> bool:
        """Take up a step's loss, and return whether the training leads away from the teacher."""
        if not math.isfinite(loss):
            return True
        self.first = loss if self.seen == 0 else self.first
        self.recent = loss if self.seen == 0 else SMOOTHED * self.recent + (1 - SMOOTHED) * loss
        self.seen += 1
        return self.seen > PATIENCE and self.recent > ASTRAY * max(self.first, 1e-6)

    def begin_again(self) -> bool:
        """Forget the losses; return whether one more attempt is allowed."""
        self.first, self.recent, self.seen = math.nan, math.nan, 0
        self.again += 1
        return self.again <= ATTEMPTS

    @property
    def share(self) -> float:
        """The share of the rate to train at now."""
        return float(SLOWER**-self.again)

    def state(self) -> dict[str, float]:
        """Return everything for a training checkpoint."""
        return dict(self.__dict__)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Watch:
        """Read what `state` returned."""
        return cls(**state)
