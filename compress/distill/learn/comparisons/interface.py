"""Define what a comparison is: a loss to train on, and measures of sums over positions.

The sums of several batches are added before the measures are taken, so that batches of any sizes
give the same figure.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Measures:
    """How close a student is to its teacher on some inputs.

    Attributes:
        agreement: 1 where they agree fully; what it counts depends on the output's kind.
        divergence: 0 where they agree fully.
    """

    agreement: float
    divergence: float


class Comparison(ABC):
    """One kind's loss and measures.

    All methods take (student, teacher, weights): outputs (rows, ..., width) twice, and (rows, ...)
    with 1 where a position counts.
    """

    counts: ClassVar[str]
    """What agreement counts, in a word."""
    temperature: ClassVar[float] = 1.0
    """Of half of the loss, where it compares distributions; 1 where the loss is plain."""
    by_divergence: ClassVar[bool] = False
    """Whether rows are drawn by their divergence once all have been seen (`order.py`)."""

    @abstractmethod
    def loss(
        self, student: Tensor, teacher: Tensor, weights: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Compute the loss to train on, ().

        Args:
            student: the student's output, (rows, ..., width).
            teacher: the teacher's, of the same shape.
            weights: (rows, ...), 1 where a position counts.
            generator: draws what a loss draws.
        """

    @abstractmethod
    def row_divergences(self, student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
        """Return each row's divergence, (rows,): the mean over its positions that count."""

    @abstractmethod
    def sums(self, student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
        """Return what `measures` needs of a batch, float64; those of several batches are added."""

    @abstractmethod
    def measures(self, sums: Tensor) -> Measures:
        """Return the measures of all batches together."""


class Averaged(Comparison):
    """Measures that are means over positions."""

    @abstractmethod
    def agreement(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the agreement of each position, (rows, ...)."""

    @abstractmethod
    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the divergence of each position, (rows, ...)."""

    def row_divergences(self, student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
        count = len(weights)
        apart = (self.divergence(student, teacher) * weights).reshape(count, -1).sum(1)
        return apart / weights.reshape(count, -1).sum(1).clamp(min=1)

    def sums(self, student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
        # On the CPU, because Metal GPUs have no float64.
        same = self.agreement(student, teacher).cpu().double()
        apart = self.divergence(student, teacher).cpu().double()
        mass = weights.cpu().double()
        return torch.stack([(same * mass).sum(), (apart * mass).sum(), mass.sum()])

    def measures(self, sums: Tensor) -> Measures:
        agreement, divergence, mass = sums.tolist()
        return Measures(agreement=agreement / mass, divergence=divergence / mass)
