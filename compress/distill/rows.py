"""Inputs as single rows, shuffled into batches of like length: no padding that need not be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kilodelta.models import Batch

POOL = 16
"""Batches whose rows are sorted by length together."""


@dataclass(frozen=True)
class Rows:
    """Rows of inputs; texts are cut to their own length, and padded again in a batch."""

    rows: tuple[Batch, ...]
    pad: Batch
    """The value that fills up each input that varies in length, (), by name."""

    def __len__(self) -> int:
        return len(self.rows)

    def length(self, index: int) -> int:
        """Tokens of a row; 1 where rows have no length."""
        mask = self.rows[index].get("attention_mask")
        return len(mask) if mask is not None else 1

    def batch(self, chosen: Sequence[int]) -> Batch:
        """Rows put together, (rows, ...), padded at the right to the longest."""
        return {
            name: _stack([self.rows[i][name] for i in chosen], self.pad.get(name))
            for name in self.rows[chosen[0]]
        }

    def subset(self, chosen: Sequence[int]) -> Rows:
        """Some of the rows, in the order given."""
        return Rows(tuple(self.rows[i] for i in chosen), self.pad)

    def in_order(self, size: int) -> Iterator[list[int]]:
        """Every row once, rows of like length together."""
        order = sorted(range(len(self)), key=self.length)
        for start in range(0, len(order), size):
            yield order[start : start + size]

    def shuffled(self, size: int, generator: torch.Generator) -> Iterator[list[int]]:
        """Batches without end: each pass shuffles, sorts pools by length, shuffles the batches."""
        size = min(size, len(self))
        while True:
            order = torch.randperm(len(self), generator=generator).tolist()
            batches = []
            for start in range(0, len(order), size * POOL):
                pool = sorted(order[start : start + size * POOL], key=self.length)
                batches += [pool[i : i + size] for i in range(0, len(pool) - size + 1, size)]
            for index in torch.randperm(len(batches), generator=generator).tolist():
                yield batches[index]


def _stack(parts: list[Tensor], pad: Tensor | None) -> Tensor:
    if pad is None:
        return torch.stack(parts)
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=float(pad))


def to_rows(batches: Sequence[Batch], pad_token: int) -> Rows:
    """Batches as `read_inputs` gives them, taken apart; padding that a mask shows is dropped."""
    rows = [row for batch in batches for row in _split(batch)]
    return Rows(tuple(rows), _pads(batches[0], pad_token))


def _pads(batch: Batch, pad_token: int) -> Batch:
    """What fills up: zero, but the pad token among the tokens; nothing where nothing varies."""
    if "attention_mask" not in batch:
        return {}
    shape = batch["attention_mask"].shape
    fills = {"input_ids": pad_token}
    return {
        name: torch.tensor(fills.get(name, 0))
        for name, values in batch.items()
        if values.shape == shape
    }


def _split(batch: Batch) -> list[Batch]:
    mask = batch.get("attention_mask")
    if mask is None:
        count = len(next(iter(batch.values())))
        return [{name: values[i] for name, values in batch.items()} for i in range(count)]
    return [
        {
            name: values[i][_kept(mask[i])] if values.shape == mask.shape else values[i]
            for name, values in batch.items()
        }
        for i in range(len(mask))
    ]


def _kept(mask: Tensor) -> slice:
    """Up to the last position that counts."""
    places = mask.nonzero()
    return slice(0, int(places[-1]) + 1 if len(places) else 1)
