"""See that kept outputs are still the tuned model's.

The facts that a cache is known by say nothing about code: of the user's function that builds a
module, or of a library. So the first input is computed again and compared with what was kept.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kilodelta.compress.distill.learn.outputs import Output
from kilodelta.compress.distill.teacher.top_k import kl_shortened
from kilodelta.errors import InputError

SAME = 0.1
"""How far outputs may be apart and still be one model's: the norm of what differs as a share of
the kept output's, or nats. bfloat16 on another device, in another batch, brings them to 0.01."""


def require_same(
    where: str,
    outputs: tuple[Output, ...],
    now: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    mask: Tensor | None,
) -> None:
    """Check that one input's kept outputs are what the model puts out now.

    Args:
        where: the folder that keeps them.
        outputs: which they are; `kept` says whether one is shortened there.
        now: the whole outputs, (1, ...) each.
        kept: the kept ones, without the axis of rows.
        mask: (1, tokens), 1 where a token counts; None where every one does.

    Raises:
        InputError: an output is another one.
    """
    for output in outputs:
        away = _distance(output, now[output.name], kept[output.name][None], mask)
        if not away <= SAME:  # NaN as well
            raise InputError(
                f"{where} holds another {output.name} than the tuned model puts out now: the"
                " code that builds or runs it has changed",
                fix="remove that folder, or give another one with --teacher-cache",
            )


def _distance(output: Output, now: Tensor, kept: Tensor, mask: Tensor | None) -> float:
    theirs, counts = output.aligned(kept, mask)
    ours, _ = output.aligned(now, mask)
    if ours.shape[:-1] != theirs.shape[:-1]:
        return torch.inf
    if output.kept:
        nats = kl_shortened(ours, theirs) * counts
        return float(nats.sum() / counts.sum().clamp(min=1))
    if ours.shape != theirs.shape:
        return torch.inf
    # An impossible class is minus infinity in both.
    apart = torch.where(ours == theirs, 0.0, ours - theirs).norm()
    return float(apart / theirs[theirs.isfinite()].norm().clamp(min=torch.finfo().tiny))
