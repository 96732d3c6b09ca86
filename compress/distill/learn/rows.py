"""Inputs as single rows, put together into batches of like length: little of one is padding."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from kilodelta.errors import InputError
from kilodelta.models import Batch

MASK = "attention_mask"

Key: TypeAlias = tuple[tuple[str, tuple[int, ...]], ...]
"""What rows of one batch must have in common: the shapes of inputs that are not padded."""


@dataclass(frozen=True)
class Rows:
    """Rows of inputs; texts are cut to their own length, and padded again in a batch.

    Attributes:
        rows: one mapping from input names to tensors without a batch axis per row.
        pad: by the name of each input that runs along the tokens, the value that fills it up, ().
            Empty where the inputs have no mask: then rows are never padded.
        counts: for each row (tokens,), 1 where the output at a token counts; empty where all do.
    """

    rows: tuple[Batch, ...]
    pad: Batch
    counts: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def length(self, index: int) -> int:
        """Count the tokens of a row; 1 where rows have no length."""
        return len(self.rows[index][MASK]) if self.pad else 1

    def extent(self, index: int) -> int:
        """Measure a row for comparison with others: its tokens, or numbers where it has none."""
        if self.pad:
            return self.length(index)
        return max(1, sum(values.numel() for values in self.rows[index].values()))

    def key(self, index: int) -> Key:
        """Return what a row must share with the others of its batch."""
        return tuple(
            (name, tuple(values.shape[1:] if name in self.pad else values.shape))
            for name, values in self.rows[index].items()
        )

    def batch(self, chosen: Sequence[int]) -> Batch:
        """Put rows of one key together, (rows, ...), padded at the right to the longest."""
        return {
            name: _stack([self.rows[i][name] for i in chosen], self.pad.get(name))
            for name in self.rows[chosen[0]]
        }

    def unpadded(self) -> Rows:
        """Return the same rows, of which only those of one length share a batch."""
        return Rows(self.rows, {}, self.counts)

    def subset(self, chosen: Sequence[int]) -> Rows:
        """Return some of the rows, in the order given."""
        counts = tuple(self.counts[i] for i in chosen) if self.counts else ()
        return Rows(tuple(self.rows[i] for i in chosen), self.pad, counts)

    def mask(self, chosen: Sequence[int]) -> Tensor | None:
        """Return which outputs of a batch count, (rows, tokens); None where every one does."""
        if self.counts:
            return _stack([self.counts[i] for i in chosen], torch.tensor(0))
        return token_mask(self.batch(chosen))

    @cached_property
    def _keys(self) -> list[Key]:
        return [self.key(index) for index in range(len(self))]

    def groups(self, order: Sequence[int]) -> Iterator[list[int]]:
        """Yield rows by key, the keys as they first occur in the data, rows in the order given."""
        found: dict[Key, list[int]] = {key: [] for key in self._keys}
        for index in order:
            found[self._keys[index]].append(index)
        yield from found.values()

    def in_order(self, size: int) -> Iterator[list[int]]:
        """Yield every row once, `size` at a time, rows of like length together."""
        for group in self.groups(range(len(self))):
            order = sorted(group, key=self.length)
            for start in range(0, len(order), size):
                yield order[start : start + size]

    def digest(self) -> str:
        """Return the SHA-256 of all rows, hexadecimal: what was read, from any source."""
        state = hashlib.sha256()
        for index in range(len(self)):
            state.update(self.row_digest(index))
        return state.hexdigest()

    def row_digest(self, index: int) -> bytes:
        """Return the SHA-256 of one row."""
        state = hashlib.sha256()
        for name, values in sorted(self.rows[index].items()):
            state.update(f"{name} {values.dtype} {tuple(values.shape)}\0".encode())
            state.update(values.contiguous().numpy().tobytes())
        if self.counts:
            state.update(b"counts\0" + self.counts[index].numpy().tobytes())
        return state.digest()


def _stack(parts: list[Tensor], pad: Tensor | None) -> Tensor:
    if pad is None:
        return torch.stack(parts)
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=float(pad))


def token_mask(batch: Batch) -> Tensor | None:
    """Return the mask (rows, tokens) of a batch, 1 where a token counts; None where it has none."""
    mask = batch.get(MASK)
    return mask if mask is not None and mask.dim() == 2 else None


def to_rows(batches: Sequence[Batch], pad_token: int) -> Rows:
    """Take batches apart; padding at the right, which a mask shows, is dropped.

    Args:
        batches: as `kilodelta.models.read_inputs` returns them.
        pad_token: fills up the token ids.

    Raises:
        InputError: a row's mask is zero everywhere, or batches hold different inputs.

    Example:
        >>> ids, mask = torch.tensor([[5, 6, 0]]), torch.tensor([[1, 1, 0]])
        >>> rows = to_rows([{"input_ids": ids, "attention_mask": mask}], pad_token=0)
        >>> rows.rows[0]["input_ids"].tolist()
        [5, 6]
    """
    _check_alike(batches)
    along = _along_tokens(batches)
    rows: list[Batch] = []
    for batch in batches:
        rows += _split(batch, along, len(rows))
    fills = {"input_ids": pad_token}
    return Rows(tuple(rows), {name: torch.tensor(fills.get(name, 0)) for name in along})


def _check_alike(batches: Sequence[Batch]) -> None:
    for batch in batches:
        if batch.keys() != batches[0].keys():
            one, other = ", ".join(batches[0]), ", ".join(batch)
            raise InputError(
                f"one batch of the inputs holds {one}, another {other}",
                fix="give the same inputs in every batch",
            )


def _along_tokens(batches: Sequence[Batch]) -> tuple[str, ...]:
    """Find the inputs whose second axis is the mask's in every batch: ids, but also boxes."""
    if any(batch[MASK].dim() != 2 if MASK in batch else True for batch in batches):
        return ()  # no mask, or one that says more than which tokens count
    return tuple(
        name
        for name in batches[0]
        if all(
            batch[name].dim() >= 2
            and batch[name].shape[:2] == batch[MASK].shape
            and not _is_image(batch[name])
            for batch in batches
        )
    )


def _is_image(values: Tensor) -> bool:
    """Channels may be as many as tokens by chance."""
    return values.dim() >= 4 and values.is_floating_point()


def _split(batch: Batch, along: Sequence[str], before: int) -> list[Batch]:
    count = len(next(iter(batch.values())))
    if not along:
        return [{name: values[i] for name, values in batch.items()} for i in range(count)]
    kept = [_kept(mask, number) for number, mask in enumerate(batch[MASK], before + 1)]
    return [
        {name: v[i][: kept[i]] if name in along else v[i] for name, v in batch.items()}
        for i in range(count)
    ]


def _kept(mask: Tensor, number: int) -> int:
    """Count the positions up to the last that counts."""
    places = mask.nonzero()
    if not len(places):
        raise InputError(
            f"input {number} has no tokens that count: its attention_mask is zero everywhere",
            fix="leave it out; an empty text is such an input where the tokenizer adds no frame",
        )
    return int(places[-1]) + 1
