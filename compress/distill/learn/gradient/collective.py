"""Compute a batch's gradient in several processes, each on its rows.

No objective is a sum over rows (`pieces.py`), so the processes meet at the outputs: these are
gathered, each process computes the loss of the whole batch from them and takes its gradient back
through its rows, and the coefficients' gradients are added up. Kilobytes travel beside the outputs.
Where the memory of any process does not hold its rows at once, all compute theirs in pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from kilodelta.compress.distill.learn.gradient.pieces import Outputs, is_out_of_memory
from kilodelta.compress.distill.processes.ranks import Ranks
from kilodelta.errors import InputError

T = TypeVar("T")


def backward_shared(
    ranks: Ranks,
    compute: Callable[[slice], Outputs],
    loss_of: Callable[[Outputs], Tensor],
    count: int,
    trained: Sequence[Tensor],
    piece: int | None = None,
) -> Tensor:
    """Compute a batch's gradient in all processes, each on its rows; return the loss, ().

    Args:
        ranks: this process among the others.
        compute: outputs of some rows of the batch, (rows, ...) each.
        loss_of: the loss of all rows' outputs.
        count: rows of the batch, at least one per process.
        trained: the parameters, whose gradients are those of the whole batch afterwards.
        piece: rows that a process computes at a time; all of its rows by default.

    Raises:
        torch.OutOfMemoryError: the memory of a process, which may be another, ran out; all raise
            it, so that all take smaller pieces.
        OutputError: a process has ended.
    """
    slices = _slices(ranks, count, piece)
    if len(slices) > 1:
        with torch.no_grad():
            parts = _together(ranks, lambda: [compute(rows) for rows, _ in slices])
        mine = {n: torch.cat([p[n] for p, (_, own) in zip(parts, slices, strict=True) if own])
                for n in parts[0]}  # fmt: skip
        del parts
    else:
        mine = dict(_together(ranks, lambda: compute(slices[0][0])))
    names = list(mine)
    sent = ranks.gather({name: mine[name].detach().cpu() for name in names})
    whole = {name: torch.cat([part[name] for part in sent]).to(mine[name].device) for name in names}
    for values in whole.values():
        values.requires_grad_(values.is_floating_point())
    loss = loss_of(whole)
    # The same sums on other hardware may differ in the last bit: the first process decides.
    stated = torch.tensor(ranks.gather(loss.item())[0])
    if not stated.isfinite():
        return stated
    loss.backward()  # type: ignore[no-untyped-call]
    slopes = {name: values.grad for name, values in whole.items() if values.grad is not None}

    def back() -> None:
        for rows, own in slices:
            outputs = mine if len(slices) == 1 else compute(rows)
            used = [name for name in slopes if outputs[name].requires_grad]
            torch.autograd.backward(
                [outputs[name] for name in used],
                [slopes[name][rows] if own else torch.zeros_like(outputs[name]) for name in used],
            )

    _together(ranks, back)
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    ranks.add_up([parameter.grad for parameter in trained if parameter.grad is not None])
    return stated


def _slices(ranks: Ranks, count: int, piece: int | None) -> list[tuple[slice, bool]]:
    """Cut this process's rows into pieces, as many as in every process.

    One that has a row less may have no rows for its last piece: it computes its first row once
    more, which does not count. Layers whose weights are sharded need all processes at every pass.
    """
    own = ranks.share(count)
    most = -(-count // ranks.count)
    step = most if piece is None else min(piece, most)
    starts = [own.start + step * i for i in range(-(-most // step))]
    return [
        (slice(start, min(start + step, own.stop)), True)
        if start < own.stop
        else (slice(own.start, own.start + 1), False)
        for start in starts
    ]


def _together(ranks: Ranks, work: Callable[[], T]) -> T:
    """Do something in all processes; where memory runs out in one, it has run out for all."""
    made: T | None = None
    ran_out = False
    try:
        made = work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        ran_out = True
    if ran_out and ranks.in_step:  # the others wait in this pass, which nobody can end
        raise InputError(
            f"memory ran out in process {ranks.rank}, in a pass that all processes make together",
            fix="give a smaller --batch or --max-length, --gradient-checkpointing, or more"
            " processes",
        )
    if ranks.any(ran_out):
        del made
        raise torch.OutOfMemoryError("out of memory in one of the processes")
    return made  # type: ignore[return-value]
