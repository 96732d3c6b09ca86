"""Score two tensors position by position: KL divergence, the same top class, cosine.

What top-1, KL and cosine mean is defined by `kilodelta.verify.parity.metrics.Metrics`; here they
are torch, in the outputs' dtype, because a loss needs gradients. tests/verify/test_one_measure.py
holds the two equal.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

TEMPERATURE = 2.0
"""By which logits are divided where a loss is to see the classes that come second and third."""
SOFT = 0.5
"""Weight of the softened divergence beside the plain one."""
IMPOSSIBLE = -1e30
"""Stands for a logit of minus infinity: its softmax is 0, and differences of it stay finite."""


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Average (rows, ...) over the positions that count.

    Example:
        >>> import torch
        >>> weighted_mean(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([1.0, 1.0, 0.0]))
        tensor(2.)
    """
    return (values * weights).sum() / weights.sum().clamp(min=1.0)


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute KL(teacher || student) over the last dimension, in nats; minus infinity is allowed.

    Example:
        >>> import torch
        >>> kl(torch.zeros(2), torch.tensor([0.0, -torch.inf]))
        tensor(0.6931)
    """
    # Clamped, because 0 * (-inf - -inf) of a class that both rule out would be NaN.
    log_p = teacher.clamp(min=IMPOSSIBLE).log_softmax(-1)
    log_q = student.clamp(min=IMPOSSIBLE).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def softened(student: Tensor, teacher: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Compute a loss for two distributions over known classes: half `kl`, half of it softened.

    A tuned model is sure of most inputs, and what it thinks of the classes that come second and
    third is nearly all that one input can teach; at a temperature T of 2 that weighs more (Hinton
    et al., arXiv 1503.02531, whose factor T^2 keeps the gradient's size). The plain half keeps
    the loss at what is measured.

    Example:
        >>> import torch
        >>> softened(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]))
        tensor(0.)
    """
    soft = temperature**2 * kl(student / temperature, teacher / temperature)
    return (1 - SOFT) * kl(student, teacher) + SOFT * soft


def top1(student: Tensor, teacher: Tensor) -> Tensor:
    """Return whether the student's largest score is the teacher's as well, bool (...).

    The last dimension holds the classes. Where the teacher's winners tie, each of them counts.

    Example:
        >>> import torch
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
