"""Measure how close a student is to its teacher on rows that it did not learn from."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kilodelta.compress.distill.learn.data import Data
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
            rows = [chosen[i] for i in part]
            batch = data.rows.batch(rows)
            found = run(loaded, batch, one_row=data.survey.one_row)
            if is_own:
                mine.append(data.objective.sums(found, data.teacher(rows), data.rows.mask(rows)))
    finally:
        loaded.module.train(training)
    # Added in the order of the batches, so that the number of processes does not matter.
    shares = data.ranks.gather(mine)
    totals: list[torch.Tensor] = []
    for index in range(len(parts)):
        sums = shares[index % data.ranks.count][index // data.ranks.count]
        totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
    return data.objective.measures(totals)
