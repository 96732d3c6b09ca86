"""Share one training among processes that torchrun has started: who computes which rows.

Every process holds the base, draws the same bases and has the same coefficients. The rows of a
batch are shared out. No objective is a sum over rows (`pieces.py`), so the processes meet at the
outputs: these are gathered, each process computes the loss of the whole batch from them, takes its
gradient back through its rows, and the coefficients' gradients are added up. Kilobytes travel
beside the outputs. All decisions follow from numbers that are the same everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from kilodelta.errors import InputError, KiloDeltaError, OutputError, one_line

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those of one run.

    Attributes:
        rank: its number, 0 for the one that writes.
        count: how many there are; with 1 nothing is exchanged.
    """

    rank: int = 0
    count: int = 1

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.rank == 0

    def share(self, size: int) -> slice:
        """Return this process's part of so many rows, in order; parts differ by one row at most.

        Example:
            >>> [Ranks(rank=r, count=3).share(8) for r in range(3)]
            [slice(0, 2, None), slice(2, 5, None), slice(5, 8, None)]
        """
        return slice(size * self.rank // self.count, size * (self.rank + 1) // self.count)

    def gather(self, value: T) -> list[T]:
        """Return what every process gave, in their order, in every process.

        Raises:
            OutputError: one of them has ended.
        """
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        with _explained():
            dist.all_gather_object(found, value)
        return found

    def first(self, make: Callable[[], T]) -> T:
        """Let the process that writes make something, and return it in all; its errors as well.

        Raises:
            KiloDeltaError: what `make` raises, in every process.
            OutputError: a process has ended.
        """
        if self.count == 1:
            return make()
        made: T | None = None
        error: KiloDeltaError | None = None
        if self.writes:
            try:
                made = make()
            except KiloDeltaError as problem:
                error = problem
        made, error = self.gather((made, error))[0]
        if error is not None:
            raise error
        return made  # type: ignore[return-value]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Add up tensors over all processes, in place.

        Raises:
            OutputError: one of them has ended.
        """
        if self.count == 1:
            return
        with _explained():
            for tensor in tensors:
                dist.all_reduce(tensor)

    def any(self, answer: bool) -> bool:
        """Return whether any process says yes."""
        return any(self.gather(answer))

    def least(self, number: int) -> int:
        """Return the least number of all processes."""
        return min(self.gather(number))


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that torchrun has started, for as long as this block takes.

    Raises:
        InputError: the environment names processes that cannot be reached.
    """
    count = _environment("WORLD_SIZE", 1)
    if count == 1 or not dist.is_available():
        yield ALONE
        return
    began = not dist.is_initialized()
    if began:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        try:
            # Objects (rows, counts) travel by gloo also where gradients travel by nccl.
            both = "gloo" if backend == "gloo" else "cpu:gloo,cuda:nccl"
            dist.init_process_group(both)
        except (RuntimeError, ValueError) as problem:
            raise InputError(
                f"the {count} processes of WORLD_SIZE cannot be joined: {one_line(problem)}",
                fix="start them by torchrun --standalone --nproc-per-node=N -m kilodelta ...",
            ) from problem
    try:
        yield Ranks(rank=dist.get_rank(), count=dist.get_world_size())
    finally:
        if began:
            dist.destroy_process_group()


def check_share(ranks: Ranks, batch: int, *, quantised: bool = False) -> None:
    """Check that several processes can share a compression, and each has rows to compute.

    Raises:
        InputError: there are more processes than rows, or the base is quantised.
    """
    if ranks.count > 1 and quantised:
        raise InputError(
            "a quantised base is compressed by one process",
            fix="run it without torchrun, or give the float model as BASE",
        )
    if ranks.count > batch:
        raise InputError(
            f"{ranks.count} processes share batches of {batch} inputs",
            fix=f"give --batch {ranks.count} or more, or start fewer processes",
        )


def local_device(device: str) -> str:
    """Return the GPU of this process where several share a machine and none is named.

    Example:
        >>> local_device("cpu")
        'cpu'
    """
    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    number = _environment("LOCAL_RANK", -1)
    return device if number < 0 else f"cuda:{number}"


def backward_shared(
    ranks: Ranks,
    compute: Callable[[slice], Mapping[str, Tensor]],
    loss_of: Callable[[Mapping[str, Tensor]], Tensor],
    count: int,
    trained: Sequence[Tensor],
) -> Tensor:
    """Compute a batch's gradient in all processes, each on its rows; return the loss, ().

    Args:
        ranks: this process among the others.
        compute: outputs of some rows of the batch, (rows, ...) each.
        loss_of: the loss of all rows' outputs.
        count: rows of the batch, at least one per process.
        trained: the parameters, whose gradients are those of the whole batch afterwards.

    Raises:
        OutputError: a process has ended.
    """
    mine = compute(ranks.share(count))
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
    used = [name for name in slopes if mine[name].requires_grad]
    torch.autograd.backward(
        [mine[name] for name in used], [slopes[name][ranks.share(count)] for name in used]
    )
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    ranks.add_up([parameter.grad for parameter in trained if parameter.grad is not None])
    return stated


def _environment(name: str, otherwise: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else otherwise


@contextmanager
def _explained() -> Iterator[None]:
    """Turn what torch raises when a connection ends into a sentence."""
    try:
        yield
    except RuntimeError as problem:
        raise OutputError(
            "another process of this run has ended, so nothing more is written",
            fix="look at what it said; give --resume to go on where the run was written last",
        ) from problem
