"""The teacher: the tuned model's outputs on the inputs, computed once where they fit in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kilodelta.compress.distill.learn.outputs import Output, Survey, run
from kilodelta.compress.distill.learn.rows import Rows, token_mask
from kilodelta.errors import InputError
from kilodelta.models import LoadedModel
from kilodelta.progress import Event, Progress

ROOM = 1 << 28
"""Bytes of outputs that are remembered; more are computed anew at every step."""
BATCH = 64


class Teacher:
    """The tuned model as a function from rows to the outputs that are matched."""

    def __init__(self, loaded: LoadedModel, rows: Rows, survey: Survey, progress: Progress) -> None:
        self._loaded, self._rows, self._survey = loaded, rows, survey
        self._remembered: list[Mapping[str, Tensor]] | None = None
        if self._estimate() < ROOM:
            self._remembered = self._compute_all(progress)

    def __call__(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        """Return the outputs of rows of one batch, (rows, ...), by name."""
        if self._remembered is None:
            return self._compute(chosen)
        parts = [self._remembered[index] for index in chosen]
        return {o.name: _padded([part[o.name] for part in parts]) for o in self._survey.matched}

    def bank(self, name: str, chosen: Sequence[int]) -> Tensor | None:
        """Return an embedding's remembered values, (rows, width); None where none are."""
        if self._remembered is None:
            return None
        return torch.stack([self._remembered[index][name] for index in chosen])

    @torch.no_grad()
    def _compute(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        batch = self._rows.batch(chosen)
        found = run(self._loaded, batch, one_row=self._survey.one_row)
        for output in self._survey.matched:
            values, _ = output.aligned(found[output.name], token_mask(batch))
            if bool((values.isnan() | (values == torch.inf)).any()):
                raise InputError(
                    f"output {output.name} of the tuned model is not finite for one of the inputs"
                    f" {', '.join(map(str, sorted(chosen)[:3]))}, ...",
                    fix="check the tuned model, or leave that output out with --outputs",
                )
        return {output.name: found[output.name].float() for output in self._survey.matched}

    def _estimate(self) -> int:
        """Bytes that all outputs take, judged by the first row's."""
        tokens = sum(map(self._rows.length, range(len(self._rows))))
        each = sum(values.nbytes for values in self._compute([0]).values())
        return each * tokens // self._rows.length(0)

    def _compute_all(self, progress: Progress) -> list[Mapping[str, Tensor]]:
        found: list[Mapping[str, Tensor]] = [{}] * len(self._rows)
        done = 0
        for chosen in self._rows.in_order(BATCH):
            values = self._compute(chosen)
            for place, index in enumerate(chosen):
                length = self._rows.length(index)
                found[index] = {
                    output.name: _cut(output, values[output.name][place], length, self._rows)
                    for output in self._survey.matched
                }
            done += len(chosen)
            progress(Event(stage="teacher", done=done, total=len(self._rows), unit="inputs"))
        return found


def _cut(output: Output, values: Tensor, length: int, rows: Rows) -> Tensor:
    """One row's output (...) without the positions that its batch's padding added."""
    for axis in output.token_axes if rows.pad else ():
        values = values.narrow(axis - 1, 0, length)
    return values.clone()


def _padded(parts: Sequence[Tensor]) -> Tensor:
    """Rows put together, (rows, ...), zeros where one is shorter than the longest."""
    shape = [max(sizes) for sizes in zip(*(part.shape for part in parts), strict=True)]
    out = parts[0].new_zeros([len(parts), *shape])
    for row, part in zip(out, parts, strict=True):
        row[tuple(slice(0, size) for size in part.shape)] = part
    return out
