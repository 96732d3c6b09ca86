"""Describe a model's outputs, compute those of a batch, and bring one into a form to compare.

========  =============================================  ==================================
kind      which outputs                                  compared as
========  =============================================  ==================================
classes   logits                                         distributions over the classes
labels    logits of a multi-label model, logits per      one yes or no per class
          token without a class axis
span      start and end logits (rows, tokens)            distributions over the tokens
embedding a sentence embedding                           directions and neighbourhoods
states    hidden states, boxes, features                 vectors along one axis
values    regression: one number per row or position     numbers
========  =============================================  ==================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from kilodelta.models import Batch, LoadedModel, outputs

Kind = Literal["classes", "labels", "span", "embedding", "states", "values"]
Outputs: TypeAlias = Mapping[str, Tensor]
"""What a model puts out for a batch, by name."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a user says about outputs.

    Attributes:
        weights: by name or glob, how much an output counts; empty means every output, equally.
        classes: by name or glob, the axis of the classes; such an output is compared as logits.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    classes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Output:
    """One output that is matched, of shape (rows, ...).

    Attributes:
        name: dotted where outputs are nested.
        kind: how it is compared; see the table above.
        weight: its share of the loss and of the agreement; all weights add up to 1.
        axis: the axis of classes or features; None for `values`.
        size: how many classes or features there are; 0 where they follow the tokens.
        token_axes: axes as long as the batch's attention mask.
        kept: how many classes per position the teacher's output is shortened to
            (`teacher.top_k`); 0 where it is whole.
    """

    name: str
    kind: Kind
    weight: float
    axis: int | None
    size: int
    token_axes: tuple[int, ...]
    kept: int = 0

    def aligned(self, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Bring an output into (rows, ..., classes), and say which positions count.

        Args:
            values: the output, (rows, ...).
            mask: (rows, tokens), 1 where a token counts; None where every one does.

        Returns:
            The values as float32, the axis of classes last (one of size 1 is added where there is
            none), and weights (rows, ...), 1 where a position counts and 0 at padding. Where the
            tokens are themselves the classes, padding is no position but an impossible choice:
            minus infinity.
        """
        mask = None if mask is None else mask.to(values.device)
        sizes = [1 if a == self.axis else n for a, n in enumerate(values.shape)]
        weights = torch.ones(sizes, device=values.device)
        for place in self.token_axes if mask is not None else ():
            assert mask is not None
            counts = mask.view(_shape(mask, place, values.dim()))
            if place == self.axis:
                values = values.masked_fill(counts == 0, -torch.inf)
            else:
                weights = weights * counts.float()
        if mask is not None and self.token_axes:  # what stands at padding may be NaN
            values = values.masked_fill(weights == 0, 0.0)
        if self.axis is None:
            return values.float().unsqueeze(-1), weights.expand(values.shape)
        return values.float().movedim(self.axis, -1), weights.squeeze(self.axis)


def _shape(mask: Tensor, place: int, dims: int) -> list[int]:
    """Return the mask's shape beside an output: its tokens at `place`, 1 elsewhere."""
    return [len(mask), *(mask.shape[1] if axis == place else 1 for axis in range(1, dims))]


def run(loaded: LoadedModel, batch: Batch, *, one_row: bool = False) -> dict[str, Tensor]:
    """Compute a batch; row by row where the model takes no more.

    Args:
        loaded: the model.
        batch: its inputs, (rows, ...).
        one_row: compute each row alone and put the outputs together.

    Returns:
        All outputs by name, (rows, ...).
    """
    count = len(next(iter(batch.values())))
    if not one_row or count == 1:
        return outputs(loaded, batch)
    parts = [outputs(loaded, {n: v[i : i + 1] for n, v in batch.items()}) for i in range(count)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
