"""Compute a decoder's logits inside the loss, some positions at a time, and never all at once.

4 x 128 positions of 49,152 words are 100 MB in float32, and a loss on them keeps several such
tensors. The last layer is linear and frozen, so the loss needs it for a few positions at a time:
each chunk's logits are computed, compared, turned into the gradient of the hidden states, and
dropped. No product is computed twice, and positions that do not count get no logits at all.

Nothing is believed about a model's code. The head is the layer that transformers calls the output
embedding, and the logits must be what it makes of its input, bit for bit, on a row of the inputs;
a model that scales or caps them afterwards is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import linear

from kilodelta.compress.distill.learn.comparisons import TopClasses
from kilodelta.compress.distill.learn.outputs import run
from kilodelta.compress.distill.learn.rows import Rows
from kilodelta.compress.distill.learn.survey import Survey
from kilodelta.compress.distill.teacher.top_k import kl_shortened
from kilodelta.models import LoadedModel

LOGITS = "logits"
"""The output that is computed late; others (an encoder's states) are compared as ever."""
CELLS = 1 << 22
"""Logits computed at a time: 16 MB in float32, and five tensors of that size beside them while all
activations of a step are kept. Half as many save little more and read the head's weight twice as
often."""


class LateTopClasses(TopClasses):
    """Shortened distributions; the student's are computed from its hidden states.

    `student` is (rows, ..., width) here, what goes into `head`.
    """

    def __init__(self, head: nn.Linear) -> None:
        self.head = head

    def loss(
        self, student: Tensor, teacher: Tensor, weights: Tensor, generator: torch.Generator
    ) -> Tensor:
        loss: Tensor = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
            student, teacher, weights, self
        )
        return loss

    def sums(self, student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros(3, dtype=torch.float64)
        for hidden, target, mass in self.chunks(student, teacher, weights):
            total += super().sums(self.logits(hidden), target, mass)
        return total

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the logits of some positions, float32 (n, classes)."""
        weight = self.head.weight
        return linear(hidden.to(weight.dtype), weight, self.head.bias).float()

    def chunks(
        self, student: Tensor, teacher: Tensor, weights: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield hidden states (n, width), targets and weights of the positions that count."""
        places = weights.reshape(-1).nonzero()[:, 0]
        hidden = student.reshape(-1, student.shape[-1])
        targets, mass = teacher.reshape(-1, teacher.shape[-1]), weights.reshape(-1)
        for part in torch.split(places, max(1, CELLS // self.head.out_features)):
            yield hidden[part], targets[part], mass[part]


class _ChunkedLoss(torch.autograd.Function):
    """The weighted mean of divergences over positions, whose gradient is computed on the way."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, weights: Tensor, late: LateTopClasses
    ) -> Tensor:
        mass = weights.sum().clamp(min=1.0)
        total = torch.zeros((), device=student.device)
        gradient = torch.zeros_like(student)
        flat = gradient.view(-1, student.shape[-1])
        places = weights.reshape(-1).nonzero()[:, 0]
        start = 0
        for hidden, target, share in late.chunks(student, teacher, weights):
            # A chunk's own graph is gone at once: who counts what a step keeps need not see it.
            with torch.enable_grad(), saved_tensors_hooks(_same, _same):
                leaf = hidden.detach().requires_grad_()
                part = (kl_shortened(late.logits(leaf), target) * share).sum() / mass
                (slope,) = torch.autograd.grad(part, leaf)
            total += part.detach()
            flat[places[start : start + len(hidden)]] = slope
            start += len(hidden)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grown: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grown, None, None, None


def _same(tensor: Tensor) -> Tensor:
    return tensor.detach()  # a node that keeps its own output would hold itself otherwise


def find_head(
    loaded: LoadedModel, rows: Rows, survey: Survey, trained: Iterable[str]
) -> nn.Linear | None:
    """Find the layer that makes a decoder's logits; None where there is none to be computed late.

    Args:
        loaded: the student, nothing attached.
        rows: the inputs, of which one is tried.
        survey: the outputs; one that is shortened and called `logits` is a candidate.
        trained: state names of what coefficients change or what trains whole.
    """
    shortened = [output.name for output in survey.matched if output.kept]
    finder = getattr(loaded.module, "get_output_embeddings", None)
    head = finder() if shortened == [LOGITS] and callable(finder) else None
    if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks:
        return None
    state = loaded.module.state_dict(keep_vars=True)
    if any(state[name] is head.weight or state[name] is head.bias for name in trained):
        return None
    batch = rows.batch([0])
    with torch.no_grad():
        whole = run(loaded, batch)[LOGITS]
        with late(head):
            hidden = run(loaded, batch)[LOGITS]
        if hidden.shape[:-1] != whole.shape[:-1] or hidden.shape[-1] != head.in_features:
            return None
        return head if torch.equal(head(hidden), whole) else None


@contextmanager
def late(head: nn.Linear) -> Iterator[None]:
    """Let a layer hand its input on in this block, so that the model puts out hidden states."""
    head.__dict__["forward"] = lambda hidden: hidden
    try:
        yield
    finally:
        del head.__dict__["forward"]
