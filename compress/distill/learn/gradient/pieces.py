"""Compute a step's gradient in pieces of its rows, where memory does not hold all of them at once.

No objective is a sum over rows: a mean weighs tokens, a relative error divides by the batch's
size, similarities compare rows with a bank. So the pieces meet at the outputs. All outputs are
computed first, without a graph; the loss of the whole batch gives the gradient of each; and each
piece is computed again, with a graph, and takes its share of that gradient back to the
coefficients (gradient caching; Gao et al., arXiv 2101.06983). It is the same mathematics at the
price of one more forward pass, and the activations of one piece at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from kilodelta.errors import InputError
from kilodelta.memory import has_run_out

T = TypeVar("T")
Outputs = Mapping[str, Tensor]


def backward(
    compute: Callable[[slice], Outputs],
    loss_of: Callable[[Outputs], Tensor],
    count: int,
    piece: int,
) -> Tensor:
    """Add the loss's gradient to the parameters', and return the loss, ().

    Args:
        compute: outputs of some rows of the batch, (rows, ...) each.
        loss_of: the loss of all rows' outputs.
        count: rows of the batch.
        piece: rows computed at a time; a graph is kept for so many.
    """
    if piece >= count:
        loss = loss_of(compute(slice(0, count)))
        if loss.isfinite():
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()
    with torch.no_grad():
        parts = [compute(rows) for rows in _slices(count, piece)]
    whole = {
        name: torch.cat([part[name] for part in parts]).requires_grad_(
            parts[0][name].is_floating_point()
        )
        for name in parts[0]
    }
    del parts
    loss = loss_of(whole)
    if not loss.isfinite():
        return loss.detach()
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: value.grad for name, value in whole.items() if value.grad is not None}
    del whole
    for rows in _slices(count, piece):
        outputs = compute(rows)
        names = [name for name in gradients if outputs[name].requires_grad]
        torch.autograd.backward(
            [outputs[name] for name in names], [gradients[name][rows] for name in names]
        )
    return loss.detach()


def _slices(count: int, piece: int) -> Iterator[slice]:
    return (slice(start, min(start + piece, count)) for start in range(0, count, piece))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a GPU or the machine ran out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or has_run_out(error)


def by_halves(
    chosen: Sequence[int], make: Callable[[Sequence[int]], T], *, in_step: bool = False
) -> list[T]:
    """Make something of some rows; of halves of them, and so on, where memory runs out.

    Args:
        chosen: the rows.
        make: what is made of rows of a batch, without a graph.
        in_step: whether other processes compute the same rows, so that none can go its own way.

    Returns:
        What was made of each part, in the order of the rows.

    Raises:
        InputError: memory ran out on a single row, or on rows that cannot be divided.
    """
    try:
        return [make(chosen)]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if in_step or len(chosen) == 1:
            raise InputError(
                f"memory ran out on {'a single input' if len(chosen) == 1 else 'a batch'}",
                fix="give a smaller --max-length, --dtype bf16, or a device with more memory",
            ) from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = -(-len(chosen) // 2)
    return [*by_halves(chosen[:half], make), *by_halves(chosen[half:], make)]
