"""Order the rows of a training: every row once, then those of a large divergence more often.

Rows that the student has right teach it little a second time. So where a training passes over its
rows again, they are drawn: half of the draws are equally likely for all, half in proportion to a
row's divergence when the student last saw it, over the mean divergence at that time. Where none is
noted, every pass is a shuffle. Rows of like length share a batch, as padding costs time.

Drawing by loss: Katharopoulos and Fleuret, arXiv 1803.00942. There each drawn row is weighted by
one over its chance, so that the mean loss stays the same. Here it is not, on purpose: what is
wanted is a student that is right on many rows, rather than a small mean.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kilodelta.compress.distill.learn.rows import Rows
from kilodelta.compress.distill.processes.ranks import ALONE, Ranks

POOL = 64
"""Batches whose rows are sorted by length together, and that are drawn at a time. With single
sentences 2 % of the positions are then padding; with pools of 16 batches it is 8 to 9 %."""
HARD = 0.5
"""The share of the draws, after the first pass, that goes by divergence."""
FOLLOWS = 0.05
"""How far a batch moves the mean to which its rows are compared: the student learns meanwhile, and
a row that it saw early is not harder for that."""


class Order:
    """Batches without end, and what is known about their rows.

    Args:
        rows: all inputs.
        learned: which of them are learned from.
        size: rows in a batch; fewer only where fewer rows can share one.
        seed: decides the order.
        ranks: this process among those that take the same batches.
    """

    def __init__(
        self, rows: Rows, learned: Sequence[int], size: int, seed: int, ranks: Ranks = ALONE
    ) -> None:
        self._learned, self._size, self._ranks = list(learned), size, ranks
        self._places = {row: place for place, row in enumerate(learned)}
        self._rows = rows.subset(learned)
        self._groups = [torch.tensor(group) for group in self._rows.groups(range(len(learned)))]
        self._generator = torch.Generator().manual_seed(seed)
        self._waiting: list[list[int]] = []
        self._relative = torch.full((len(learned),), torch.nan)
        """A row's divergence over the mean at that time; NaN of rows not seen."""
        self._mean = torch.tensor(torch.nan)

    def next(self) -> list[int]:
        """Return the rows of the next batch."""
        if not self._waiting:
            self._waiting = self._drawn() if self._knows else self._shuffled()
        return [self._learned[place] for place in self._waiting.pop(0)]

    def note(self, chosen: Sequence[int], divergences: Tensor) -> None:
        """Take up the divergences of a batch's rows, (rows,), 0 and more.

        A batch with one that is not finite is left out.
        """
        divergences = divergences.detach().float().cpu()
        if not divergences.isfinite().all():
            return
        mean = divergences.mean()
        self._mean = mean if self._mean.isnan() else self._mean.lerp(mean, FOLLOWS)
        if self._mean > 0:
            self._relative[[self._places[row] for row in chosen]] = divergences / self._mean

    @property
    def _knows(self) -> bool:
        """Whether a pass has told enough to draw by; batches of one size may leave rows out."""
        return int(self._relative.isnan().sum()) < max(self._size, len(self._relative) // 2)

    def _shuffled(self) -> list[list[int]]:
        """Return the batches of a pass over all rows, shuffled."""
        order = torch.randperm(len(self._rows), generator=self._generator).tolist()
        batches: list[list[int]] = []
        for group in self._rows.groups(order):
            size = min(self._size, len(group))
            for start in range(0, len(group), size * POOL):
                batches += self._cut(group[start : start + size * POOL], size)
        return self._mixed(batches)

    def _drawn(self) -> list[list[int]]:
        """Return some batches of drawn rows, a row in proportion to its weight.

        Each batch first draws the rows that may share it (those of one shape, where nothing is
        padded), by the weights of all of them.
        """
        self._ranks.copy_first([self._relative])
        relative = self._relative.double().nan_to_num(1.0)
        weights = HARD * relative / relative.mean().clamp(min=1e-300) + 1 - HARD
        totals = torch.stack([weights[group].sum() for group in self._groups])
        batches: list[list[int]] = []
        counts = Counter(self._draw(totals, POOL).tolist())
        for place in sorted(counts):
            group = self._groups[place]
            size = min(self._size, len(group))
            drawn = group[self._draw(weights[group], size * counts[place])]
            batches += self._cut(drawn.tolist(), size)
        return self._mixed(batches)

    def _draw(self, weights: Tensor, count: int) -> Tensor:
        """Draw places with replacement, float64 weights (n,); torch's own takes 2**24 at most."""
        edges = weights.cumsum(0)
        at = torch.rand(count, dtype=torch.float64, generator=self._generator) * edges[-1]
        return torch.searchsorted(edges, at, right=True).clamp(max=len(weights) - 1)

    def _cut(self, pool: list[int], size: int) -> list[list[int]]:
        """Cut a pool into batches of rows of like length; what does not fill one is left out."""
        pool = sorted(pool, key=self._rows.length)
        return [pool[i : i + size] for i in range(0, len(pool) - size + 1, size)]

    def _mixed(self, batches: list[list[int]]) -> list[list[int]]:
        places = torch.randperm(len(batches), generator=self._generator).tolist()
        return [batches[place] for place in places]

    def state(self) -> dict[str, Any]:
        """Return what a later run needs to go on with the same batches."""
        return {
            "waiting": [list(batch) for batch in self._waiting],
            "relative": self._relative,
            "mean": self._mean,
            "generator": self._generator.get_state(),
        }

    def restore(self, found: Mapping[str, Any]) -> None:
        """Go on where `state` was asked."""
        self._waiting = [list(batch) for batch in found["waiting"]]
        if len(found["relative"]) != len(self._relative):
            raise ValueError("rows of another run")
        self._relative, self._mean = found["relative"].clone(), found["mean"].clone()
        self._generator.set_state(found["generator"])
