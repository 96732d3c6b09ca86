"""Measure how close a student is to its teacher on rows that it did not learn from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from kilodelta.compress.distill.learn.data import Data
from kilodelta.compress.distill.learn.gradient.pieces import by_halves
from kilodelta.compress.distill.learn.objective import Measures
from kilodelta.compress.distill.learn.outputs import run
from kilodelta.compress.distill.teacher.ask import batch_rows
from kilodelta.models import LoadedModel


@torch.no_grad()
def measure(loaded: LoadedModel, data: Data, chosen: Sequence[int]) -> tuple[Measures, ...]:
    """Measure each matched output over some rows, every position that is no padding equally.

    Args:
        loaded: the student; it is measured in eval mode and left in its own.
        data: rows, teacher and objective; its processes share the rows.
        chosen: indices of the rows.

    Returns:
        Agreement and divergence per output, in the objective's order.
    """
    training = loaded.module.training
    loaded.module.eval()
    parts = list(data.rows.subset(chosen).in_order(batch_rows(data.rows, data.survey)))
    mine: list[list[torch.Tensor]] = []
    try:
        for part, is_own in data.ranks.turns(parts):
            own: list[list[torch.Tensor]] = by_halves(
                [chosen[i] for i in part],
                partial(_sums, loaded, data, is_own=is_own),
                in_step=data.ranks.in_step,
            )
            if is_own:
                mine.append([sum(sums[1:], sums[0]) for sums in zip(*own, strict=True)])
    finally:
        loaded.module.train(training)
    # Added in the order of the batches, so that the number of processes does not matter.
    shares = data.ranks.gather(mine)
    totals: list[torch.Tensor] = []
    for index in range(len(parts)):
        sums = shares[index % data.ranks.count][index // data.ranks.count]
        totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
    return data.objective.measures(totals)


def _sums(
    loaded: LoadedModel, data: Data, rows: Sequence[int], *, is_own: bool
) -> list[torch.Tensor]:
    """Compute a batch, and add up what its rows say; nothing of another process's."""
    found = run(loaded, data.rows.batch(rows), one_row=data.survey.one_row)
    return data.objective.sums(found, data.teacher(rows), data.rows.mask(rows)) if is_own else []
