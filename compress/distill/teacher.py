"""The teacher: the tuned model's outputs on the inputs, computed once where they fit in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kilodelta.compress.distill.rows import Rows
from kilodelta.models import LoadedModel, counted, outputs
from kilodelta.progress import Event, Progress

ROOM = 1 << 28
"""Bytes of outputs that are remembered; more are computed at every step anew."""
BATCH = 64


class Teacher:
    """The tuned model as a function from rows to the output that counts."""

    def __init__(self, loaded: LoadedModel, rows: Rows, progress: Progress) -> None:
        self._loaded, self._rows = loaded, rows
        first = self._compute([0])
        self.output = self._name
        self._known: list[Tensor] | None = None
        if first.nbytes * len(rows) < ROOM:
            self._known = self._compute_all(progress)

    @torch.no_grad()
    def _compute(self, chosen: Sequence[int]) -> Tensor:
        found = outputs(self._loaded, self._rows.batch(chosen))
        self._name = counted(found)
        return found[self._name].float()

    def _compute_all(self, progress: Progress) -> list[Tensor]:
        known: list[Tensor] = [torch.empty(0)] * len(self._rows)
        done = 0
        for chosen in self._rows.in_order(BATCH):
            for index, values in zip(chosen, self._compute(chosen), strict=True):
                length = self._rows.length(index)
                known[index] = values[:length].clone() if values.dim() > 1 else values.clone()
            done += len(chosen)
            progress(Event(stage="teacher", done=done, total=len(self._rows), unit="inputs"))
        return known

    def __call__(self, chosen: Sequence[int]) -> Tensor:
        """The outputs of rows, (rows, ..., width)."""
        if self._known is None:
            return self._compute(chosen)
        parts = [self._known[index] for index in chosen]
        if parts[0].dim() == 1:
            return torch.stack(parts)
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)

    @property
    def bank(self) -> Tensor | None:
        """All remembered outputs, (n, width), where each is one vector."""
        if self._known is None or self._known[0].dim() != 1:
            return None
        return torch.stack(self._known)
