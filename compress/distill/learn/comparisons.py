"""What it means to compute the same: a loss to train on and measures to report, by output kind.

Logits are compared as distributions (KL divergence, Hinton et al., arXiv 1503.02531). Where labels
are known, embeddings are compared by their logits too, and pulled to the teacher's as far as there
are coefficients to carry them: a few labels say little about a text, and a student that follows
them alone drifts away from its teacher on new ones. Other embeddings live in a space in which only
neighbourhoods matter: beside the distance to the teacher's own embedding, the student's
similarities to a bank of the teacher's embeddings of other inputs must follow the teacher's
(relational distillation, Park et al., arXiv 1904.05068). Other states are compared by their
normalised mean square.

Measures are made of sums over positions, so that batches of any sizes give the same figure. What
top-1, KL and cosine mean is defined by `kilodelta.verify.parity.metrics.Metrics`; here they are
torch, in the outputs' dtype, because a loss needs gradients. tests/verify/test_one_measure.py holds
the two equal.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from kilodelta.compress.distill.learn.outputs import Output
from kilodelta.compress.distill.teacher.top_k import kl_shortened, unpack

SHARPNESS = 20.0
"""Cosines are multiplied by this before they become a distribution, as retrieval models do."""
BANK = 2048
"""Teacher embeddings that a student is compared with at a time."""
PULL = 3.0
"""Weight of 1 - cosine to the teacher's embedding beside the divergence over labels, in full."""
PULLED = 90_000
"""Coefficients from which the pull has its full weight; below, it grows with their number.

Measured on a sentence encoder (`benchmarks/fidelity.py`'s recipe): with 97,000 coefficients the
full pull raises agreement on TREC-6's test texts from 98.4 to 99.0 % and the cosine from 0.80 to
0.99; with 21,000 it costs a point of accuracy on Banking77 (89.7 %), a fifth of it does not
(90.7 %).
"""
IMPOSSIBLE = -1e30
"""Stands for a logit of minus infinity: its softmax is 0, and differences of it stay finite."""


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
    def sums(self, student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
        """Return what `measures` needs of a batch, float64; those of several batches are added."""

    @abstractmethod
    def measures(self, sums: Tensor) -> Measures:
        """Return the measures of all batches together."""


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Average (rows, ...) over the positions that count.

    Example:
        >>> weighted_mean(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([1.0, 1.0, 0.0]))
        tensor(2.)
    """
    return (values * weights).sum() / weights.sum().clamp(min=1.0)


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute KL(teacher || student) over the last dimension, in nats; minus infinity is allowed.

    Example:
        >>> kl(torch.zeros(2), torch.tensor([0.0, -torch.inf]))
        tensor(0.6931)
    """
    # Clamped, because 0 * (-inf - -inf) of a class that both rule out would be NaN.
    log_p = teacher.clamp(min=IMPOSSIBLE).log_softmax(-1)
    log_q = student.clamp(min=IMPOSSIBLE).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def top1(student: Tensor, teacher: Tensor) -> Tensor:
    """Return whether the student's largest score is the teacher's as well, bool (...).

    The last dimension holds the classes. Where the teacher's winners tie, each of them counts.

    Example:
        >>> top1(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([5.0, 5.0, 1.0]))
        tensor(True)
    """
    winner = student.argmax(-1, keepdim=True)
    return teacher.gather(-1, winner)[..., 0] == teacher.amax(-1)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the cosine over the last dimension; two zero vectors point the same way."""
    # torch's default eps of 1e-8 would call two equal vectors that are shorter than it unlike.
    cosines = functional.cosine_similarity(student, teacher, dim=-1, eps=1e-30)
    both_zero = (student == 0).all(-1) & (teacher == 0).all(-1)
    return cosines.masked_fill(both_zero, 1.0)


class _Averaged(Comparison):
    """Measures that are means over positions."""

    @abstractmethod
    def agreement(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the agreement of each position, (rows, ...)."""

    @abstractmethod
    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the divergence of each position, (rows, ...)."""

    def sums(self, student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
        # On the CPU, because Metal GPUs have no float64.
        same = self.agreement(student, teacher).cpu().double()
        apart = self.divergence(student, teacher).cpu().double()
        mass = weights.cpu().double()
        return torch.stack([(same * mass).sum(), (apart * mass).sum(), mass.sum()])

    def measures(self, sums: Tensor) -> Measures:
        agreement, divergence, mass = sums.tolist()
        return Measures(agreement=agreement / mass, divergence=divergence / mass)


class Classes(_Averaged):
    """Distributions over classes, or over the tokens of a span."""

    counts = "top-1"

    def loss(
        self, student: Tensor, teacher: Tensor, weights: Tensor, generator: torch.Generator
    ) -> Tensor:
        return weighted_mean(kl(student, teacher), weights)

    def agreement(self, student: Tensor, teacher: Tensor) -> Tensor:
        return top1(student, teacher)

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        return kl(student, teacher)


class TopClasses(Classes):
    """Distributions over a vocabulary, the teacher's shortened to its most likely classes."""

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


class Labels(_Averaged):
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


class States(_Averaged):
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


class Relational(States):
    """Distance to the teacher's embedding, and divergence of the similarities to a bank of them."""

    def __init__(self, bank: Tensor) -> None:
        self.bank = functional.normalize(bank, dim=-1)

    def loss(
        self, student: Tensor, teacher: Tensor, weights: Tensor, generator: torch.Generator
    ) -> Tensor:
        ours, theirs = functional.normalize(student, dim=-1), functional.normalize(teacher, dim=-1)
        count = len(self.bank)
        chosen = self.bank[torch.randint(count, (min(BANK, count),), generator=generator)]
        chosen = chosen.to(student.device)
        near = kl(SHARPNESS * ours @ chosen.T, SHARPNESS * theirs @ chosen.T)
        return weighted_mean(near + 1 - (ours * theirs).sum(-1), weights)


class Head(Classes):
    """Cosines to fixed labels, sharpened, as logits; and a pull to the teacher's embedding."""

    def __init__(self, labels: Tensor, pull: float) -> None:
        self.labels = SHARPNESS * functional.normalize(labels, dim=-1)
        self.pull = pull

    def logits(self, embeddings: Tensor) -> Tensor:
        """Score each label, (rows, labels)."""
        return functional.normalize(embeddings, dim=-1) @ self.labels.to(embeddings.device).T

    def loss(
        self, student: Tensor, teacher: Tensor, weights: Tensor, generator: torch.Generator
    ) -> Tensor:
        apart = weighted_mean(1 - cosine(student, teacher), weights)
        return weighted_mean(self.divergence(student, teacher), weights) + self.pull * apart

    def agreement(self, student: Tensor, teacher: Tensor) -> Tensor:
        return super().agreement(self.logits(student), self.logits(teacher))

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        return super().divergence(self.logits(student), self.logits(teacher))


def comparison_for(
    output: Output,
    *,
    bank: Tensor | None = None,
    labels: Tensor | None = None,
    coefficients: int = 0,
) -> Comparison:
    """Choose how an output is compared.

    Args:
        output: what it is.
        bank: the teacher's embeddings of other inputs, (n, width).
        labels: the embeddings of a fixed set of labels or queries, (n, width): what counts then
            is the distribution over them that an embedding's cosines give.
        coefficients: how many the student has to follow the embeddings with, beside the labels.
    """
    if output.kind == "embedding" and labels is not None:
        return Head(labels, pull=PULL * min(1.0, coefficients / PULLED))
    if output.kind == "embedding" and bank is not None:
        return Relational(bank)
    return TopClasses() if output.kept else _BY_KIND[output.kind]()


_BY_KIND: Mapping[str, type[Classes | Labels | States]] = {
    "classes": Classes,
    "span": Classes,
    "labels": Labels,
    "embedding": States,
    "states": States,
    "values": Values,
}
