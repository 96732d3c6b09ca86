"""Say how long and how fast a distillation trains, and hold what it reached."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from kilodelta.compress.distill.learn.objective import Measures
from kilodelta.compress.training.products.rounded import FLOAT32


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast: AdamW, linear warm-up, cosine decay, rounded at the end.

    Attributes:
        steps: training steps.
        rate: the largest learning rate.
        batch: rows in a step.
        warm: share of the steps in which the rate rises.
        rounded: share of the steps, at the end, that run with rounded coefficients.
        bits: bits of a rounded coefficient.
        seed: decides batches and draws.
        products: the type in which steps multiply with frozen float32 weights.
    """

    steps: int
    rate: float
    batch: int = 32
    warm: float = 0.05
    rounded: float = 0.25
    bits: int = 4
    seed: int = 0
    products: str = FLOAT32

    def factor(self, step: int) -> float:
        """Return the rate at a step as a share of `rate`.

        Example:
            >>> schedule = Schedule(steps=100, rate=1.0)
            >>> [round(schedule.factor(step), 2) for step in (0, 4, 52, 99)]
            [0.2, 1.0, 0.51, 0.0]
        """
        warm = max(1, round(self.warm * self.steps))
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, self.steps - warm))))

    @property
    def rounds_from(self) -> int:
        """The first step that runs with rounded coefficients."""
        return min(self.steps - 1, round((1 - self.rounded) * self.steps))


@dataclass(frozen=True, kw_only=True)
class Look:
    """The measures on the held-out rows after a step, over all outputs by their weights."""

    step: int
    agreement: float
    divergence: float


@dataclass
class BestState:
    """The best rounded coefficients so far, by their divergence on the held-out rows."""

    divergence: float = math.inf
    measures: tuple[Measures, ...] = ()
    state: dict[str, Tensor] = field(default_factory=dict)

    def offer(
        self, divergence: float, measures: tuple[Measures, ...], state: Mapping[str, Tensor]
    ) -> None:
        """Take a state if it is at least as good; of equals the later one has trained longer."""
        divergence = math.inf if math.isnan(divergence) else divergence
        if not self.state or divergence <= self.divergence:
            self.divergence, self.measures = divergence, measures
            self.state = {name: values.detach().clone() for name, values in state.items()}


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """What a run reached.

    Attributes:
        measures: the best rounded state's, per output, on the held-out rows.
        curve: every look at the held-out rows, in the order of the steps.
        steps: how many steps were taken.
        seconds: time spent in them, over all runs that were resumed.
        interrupted: whether the run was stopped before its last step.
        piece: rows that were computed at a time because memory is short; 0 for a whole batch.
        again: how often the training went astray and began again at a lower rate.
        rate: the learning rate that a search chose; 0 without one.
        trials: how many trainings it was chosen of.
    """

    measures: tuple[Measures, ...]
    curve: tuple[Look, ...]
    steps: int
    seconds: float
    interrupted: bool
    piece: int = 0
    again: int = 0
    rate: float = 0.0
    trials: int = 0
