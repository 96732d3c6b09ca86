"""Notice that a training goes astray, so that it begins again at a lower rate.

Every training begins at its method's rate. How large a step a model bears depends on how far its
fine-tune is from it: six steps at the full rate bring a base that is far away much nearer, and lead
one that is near already away. The losses and the held-out inputs say which of them it is.
"""

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
SHORT = 100
"""Steps below which a training is judged at its end as well, by the held-out inputs: it has no time
to come back from where the first large steps lead. It begins again from its first step."""

NEAR = 1e-5
"""A divergence up to which a model is the tuned one as far as anybody can tell, wherever the
training began: an SVD may begin at what it should end with, and rounded coefficients differ."""


@dataclass
class Watch:
    """What a training's losses say.

    Attributes:
        first: the loss of the first step since the training began, or began again.
        recent: the mean of recent losses.
        seen: how many losses these are.
        again: how often the training has begun again.
        start: divergence on the held-out rows where the training began; NaN where none was taken.
    """

    first: float = math.nan
    recent: float = math.nan
    seen: int = 0
    again: int = 0
    start: float = math.nan

    def is_astray(self, loss: float) -> bool:
        """Take up a step's loss, and return whether the training seems to lead away."""
        if not math.isfinite(loss):
            return True
        self.first = loss if self.seen == 0 else self.first
        self.recent = loss if self.seen == 0 else SMOOTHED * self.recent + (1 - SMOOTHED) * loss
        self.seen += 1
        return self.seen > PATIENCE and self.recent > ASTRAY * max(self.first, 1e-6)

    def begin_again(self) -> bool:
        """Forget the losses, where one more attempt is allowed; return whether it is."""
        if self.again == ATTEMPTS:
            return False
        self.first, self.recent, self.seen = math.nan, math.nan, 0
        self.again += 1
        return True

    def has_harmed(self, divergence: float) -> bool:
        """Return whether a state of this held-out divergence is no nearer than the beginning."""
        return not (math.isnan(self.start) or divergence < self.start or divergence <= NEAR)

    def was_wrong(self) -> None:
        """Go on in spite of a growth, of which the next doubt is counted."""
        self.first = max(self.first, self.recent)

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
