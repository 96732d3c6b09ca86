"""What it means to compute the same: a loss to train on and measures to report, by output kind.

Logits are compared as distributions (KL divergence, Hinton et al., arXiv 1503.02531). Where labels
are known, embeddings are compared by their logits too, and pulled to the teacher's as far as there
are coefficients to carry them: a few labels say little about a text, and a student that follows
them alone drifts away from its teacher on new ones. Other embeddings live in a space in which only
neighbourhoods matter: beside the distance to the teacher's own embedding, the student's
similarities to a bank of the teacher's embeddings of other inputs must follow the teacher's
(relational distillation, Park et al., arXiv 1904.05068). Other states are compared by their
normalised mean square.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kilodelta.models.heads import EMBEDDING

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


@dataclass(frozen=True, kw_only=True)
class Measures:
    """How close a student is to its teacher on some inputs.

    `agreement` is the share of equal top-1 choices for logits, the mean cosine otherwise;
    `divergence` the KL divergence in nats for logits, the mean of 1 - cosine otherwise.
    """

    agreement: float
    divergence: float


@dataclass(frozen=True)
class Objective:
    """One output's loss and measures; both take (student, teacher, mask).

    Shapes are (rows, ..., width); the mask (rows, ...) is 1 where a position counts.
    """

    name: str
    kind: str
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    measure: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def objective_for(
    name: str, bank: Tensor | None, labels: Tensor | None = None, *, coefficients: int = 0
) -> Objective:
    """The objective of an output by its name.

    Args:
        bank: the teacher's embeddings of other inputs, (n, width).
        labels: the embeddings of a fixed set of labels or queries, (n, width): what counts then
            is the distribution over them that an embedding's cosines give.
        coefficients: how many the student has to follow the embeddings with, beside the labels.
    """
    if "logits" in name:
        return Objective(name, "logits", _divergence, _compare_choices)
    if labels is not None:
        head = _Head(labels, pull=PULL * min(1.0, coefficients / PULLED))
        return Objective(name, "logits", head.loss, head.measure)
    if name == EMBEDDING and bank is not None:
        return Objective(name, "embedding", _Relational(bank), _compare_angles)
    return Objective(name, "states", _square, _compare_angles)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of (rows, ...) where the mask is 1."""
    weights = mask.to(values.dtype)
    return (values * weights).sum() / weights.sum().clamp(min=1.0)


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) over the last dimension."""
    target = teacher.log_softmax(-1)
    return (target.exp() * (target - student.log_softmax(-1))).sum(-1)


def _divergence(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    return masked_mean(_kl(student, teacher), mask)


def _square(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    error = (student - teacher).square().mean(-1)
    return masked_mean(error, mask) / masked_mean(teacher.square().mean(-1), mask).clamp(min=1e-12)


class _Head:
    """Cosines to fixed labels, sharpened, as logits; and a pull to the teacher's embedding."""

    def __init__(self, labels: Tensor, pull: float) -> None:
        self.labels = SHARPNESS * functional.normalize(labels, dim=-1)
        self.pull = pull

    def logits(self, embeddings: Tensor) -> Tensor:
        return functional.normalize(embeddings, dim=-1) @ self.labels.T

    def loss(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        apart = 1 - functional.cosine_similarity(student, teacher, dim=-1)
        kl = _divergence(self.logits(student), self.logits(teacher), mask)
        return kl + self.pull * masked_mean(apart, mask)

    def measure(self, student: Tensor, teacher: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return _compare_choices(self.logits(student), self.logits(teacher), mask)


class _Relational:
    """Distance to the teacher's embedding, and divergence of the similarities to a bank of them."""

    def __init__(self, bank: Tensor) -> None:
        self.bank = functional.normalize(bank, dim=-1)

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        ours, theirs = functional.normalize(student, dim=-1), functional.normalize(teacher, dim=-1)
        chosen = self.bank[torch.randint(len(self.bank), (min(BANK, len(self.bank)),))]
        near = _kl(SHARPNESS * ours @ chosen.T, SHARPNESS * theirs @ chosen.T)
        return masked_mean(near + 1 - (ours * theirs).sum(-1), mask)


def _compare_choices(student: Tensor, teacher: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    same = (student.argmax(-1) == teacher.argmax(-1)).to(student.dtype)
    return masked_mean(same, mask), masked_mean(_kl(student, teacher), mask)


def _compare_angles(student: Tensor, teacher: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    cosine = functional.cosine_similarity(student, teacher, dim=-1)
    return masked_mean(cosine, mask), masked_mean(1 - cosine, mask)
