"""Compare outputs of each kind that needs nothing but the two outputs.

Logits are compared as distributions (KL divergence, Hinton et al., arXiv 1503.02531; over a fixed
set of classes also a softened one, `scores.softened`, to train on), states by
their normalised mean square, numbers by the coefficient of determination.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kilodelta.compress.distill.learn.comparisons.interface import Averaged, Measures
from kilodelta.compress.distill.learn.comparisons.scores import (
    IMPOSSIBLE,
    TEMPERATURE,
    cosine,
    kl,
    softened,
    top1,
    weighted_mean,
)
from kilodelta.compress.distill.teacher.top_k import kl_shortened, unpack


class Classes(Averaged):
    """Distributions over classes, or over the tokens of a span."""

    counts = "top-1"
    temperature = TEMPERATURE
    by_divergence = True

    def loss(
        self, student: Tensor, teacher: Tensor, weights: Tensor, generator: torch.Generator
    ) -> Tensor:
        return weighted_mean(softened(student, teacher, self.temperature), weights)

    def agreement(self, student: Tensor, teacher: Tensor) -> Tensor:
        return top1(student, teacher)

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        return kl(student, teacher)


class TopClasses(Classes):
    """Distributions over a vocabulary, the teacher's shortened to its most likely classes."""

    temperature = 1.0
    by_divergence = False

    def loss(
        self, student: Tensor, teacher: Tensor, weights: Tensor, generator: torch.Generator
    ) -> Tensor:
        return weighted_mean(kl_shortened(student, teacher), weights)

    def agreement(self, student: Tensor, teacher: Tensor) -> Tensor:
        logs, indices, _ = unpack(teacher)
        winners = logs == logs[..., :1]  # where the teacher's winners tie, each of them counts
        return ((indices == student.argmax(-1, keepdim=True)) & winners).any(-1)

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        return kl_shortened(student, teacher)


class Labels(Averaged):
    """One yes or no per class: the divergence is summed over the classes."""

    counts = "yes-no"

    def loss(
        self, student: Tensor, teacher: Tensor, weights: Tensor, generator: torch.Generator
    ) -> Tensor:
        return weighted_mean(self.divergence(student, teacher), weights)

    def agreement(self, student: Tensor, teacher: Tensor) -> Tensor:
        return ((student > 0) == (teacher > 0)).float().mean(-1)

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        s, t = student.clamp(min=IMPOSSIBLE), teacher.clamp(min=IMPOSSIBLE)
        yes = t.sigmoid() * (functional.logsigmoid(t) - functional.logsigmoid(s))
        no = (-t).sigmoid() * (functional.logsigmoid(-t) - functional.logsigmoid(-s))
        return (yes + no).sum(-1)


class States(Averaged):
    """Vectors: the loss is their mean square error over the teacher's mean square."""

    counts = "cosine"

    def loss(
        self, student: Tensor, teacher: Tensor, weights: Tensor, generator: torch.Generator
    ) -> Tensor:
        error = (student - teacher).square().mean(-1)
        size = weighted_mean(teacher.square().mean(-1), weights).clamp(min=1e-12)
        return weighted_mean(error, weights) / size

    def agreement(self, student: Tensor, teacher: Tensor) -> Tensor:
        return cosine(student, teacher)

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        return 1 - cosine(student, teacher)


class Values(States):
    """Numbers: agreement is the coefficient of determination, 1 - (squared error / variance)."""

    counts = "r2"

    def sums(self, student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
        s, t, mass = (v.cpu().double() for v in (student[..., 0], teacher[..., 0], weights))
        error = (s - t).square()
        return torch.stack([(v * mass).sum() for v in (error, t, t.square(), torch.ones_like(t))])

    def measures(self, sums: Tensor) -> Measures:
        error, total, squares, mass = sums.tolist()
        variance = squares - total * total / mass
        constant = variance <= 1e-12 * squares  # the teacher says the same number everywhere
        apart = float(error > 1e-12 * squares) if constant else error / variance
        return Measures(agreement=1 - apart, divergence=apart)
