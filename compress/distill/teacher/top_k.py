"""Shorten a distribution over a vocabulary to its k most likely words and the rest's mass.

A decoder of 49,152 words puts out 197 KB per position in float32; its 128 most likely words with
the mass of all others take 1 KB. The loss on these is the KL divergence of the two distributions
over k + 1 outcomes, the last of which is "any other word". Lumping outcomes together never raises
a divergence (the data processing inequality; Cover and Thomas, Elements of Information Theory,
2.8), so it is a lower bound of the whole one, and equal to it where teacher and student agree
about the proportions within the rest.

A shortened distribution is packed in one float32 tensor (..., 2 k + 1), which is cut, padded and
stored like any other output: k log-probabilities in falling order, their k indices (float32 holds
integers to 2^24 exactly), and the logarithm of the rest's mass.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOP_K = 128
"""Words kept per position.

Where the word of rank r has a probability near r^-1.5, the rest has 5 % of the mass and 6 % of the
divergence, and the gradient's cosine to the whole one's is 0.99999 (`tests/compress/test_teacher`).
"""
LARGEST = 1 << 24
"""Indices from which float32 does not hold every integer."""
IMPOSSIBLE = -1e4
"""Stands for the logarithm of 0: its exponential is 0, and differences of it stay finite."""
LEAST = -80.0
"""Logarithm of the smallest mass of a rest: e^-80 is still a normal float32."""


def shorten(logits: Tensor, k: int) -> Tensor:
    """Keep the k most likely classes of each position.

    The first index is what `argmax` chooses, also where several logits are equal.

    Args:
        logits: (..., classes); minus infinity is an impossible class.
        k: how many to keep, fewer than there are classes.

    Returns:
        The packed distribution, float32 (..., 2 k + 1).

    Example:
        >>> shorten(torch.tensor([0.0, 2.0, 1.0]), 2)[2:4].tolist()  # the indices
        [1.0, 2.0]
    """
    logs = logits.float().log_softmax(-1)
    top, indices = logs.topk(k, dim=-1)
    first = logs.argmax(-1, keepdim=True)
    # `topk` may order equal values as it likes; agreement compares with `argmax`.
    order = (indices != first).int().argsort(dim=-1, stable=True)
    top, indices = top.gather(-1, order), indices.gather(-1, order)
    top = top.clamp(min=IMPOSSIBLE)
    others = logs.scatter(-1, indices, -torch.inf)
    rest = others.logsumexp(-1, keepdim=True).clamp(min=LEAST)
    return torch.cat([top, indices.float(), rest], dim=-1)


def unpack(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities (..., k), indices int64 (..., k) and the rest's logarithm (...)."""
    k = packed.shape[-1] // 2
    return packed[..., :k], packed[..., k : 2 * k].long(), packed[..., -1]


def kl_shortened(student: Tensor, packed: Tensor) -> Tensor:
    """Compute KL(teacher || student) over the teacher's k classes and the rest, in nats, (...).

    Args:
        student: logits (..., classes).
        packed: the teacher's shortened distribution, (..., 2 k + 1).

    Example:
        >>> logits = torch.tensor([3.0, 2.0, 1.0, 0.0])
        >>> kl_shortened(logits, shorten(logits, 2)).abs() < 1e-6
        tensor(True)
    """
    theirs, indices, rest = unpack(packed)
    whole = student.logsumexp(-1, keepdim=True)
    ours = (student.gather(-1, indices) - whole).clamp(min=10 * IMPOSSIBLE)
    # log(1 - mass of the k): from the mass itself, which is exact to float32 beside 1.
    left = (1 - ours.exp().sum(-1)).clamp(min=torch.finfo(student.dtype).eps).log()
    parts = (theirs.exp() * (theirs - ours)).sum(-1)
    return parts + rest.exp() * (rest - left)
