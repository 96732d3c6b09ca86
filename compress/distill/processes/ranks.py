"""This process among those of one run: what is its part, and how values travel between them.

Every process takes the same decisions, because all numbers that decide are gathered or come from
the first process. With one process nothing is exchanged, and no line computes anything else than
without this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from kilodelta.errors import KiloDeltaError, OutputError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those of one run.

    Attributes:
        rank: its number, 0 for the one that writes.
        count: how many there are; with 1 nothing is exchanged.
        in_step: whether weights are sharded, so that every pass needs every process.
        patient: the group in which the others wait for long work of the first process; None for
            the group of everything else, whose timeout is shorter.
    """

    rank: int = 0
    count: int = 1
    in_step: bool = False
    patient: Any = None

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

    def turns(self, parts: Sequence[T]) -> Iterator[tuple[T, bool]]:
        """Yield this process's parts, dealt in turn, and whether each is its own.

        Where parts run out, a process repeats the last one, which is then not its own: so all make
        the same number of passes, as layers whose weights are sharded demand, and none is slower
        for it, for all wait for the last.

        Example:
            >>> [list(Ranks(rank=r, count=2).turns("abc")) for r in range(2)]
            [[('a', True), ('c', True)], [('b', True), ('c', False)]]
        """
        for first in range(0, len(parts), self.count):
            place = first + self.rank
            yield parts[min(place, len(parts) - 1)], place < len(parts)

    def gather(self, value: T, *, patient: bool = False) -> list[T]:
        """Return what every process gave, in their order, in every process.

        Args:
            value: this process's.
            patient: whether one of them may work for long before it gives its value.

        Raises:
            OutputError: one of them has ended.
        """
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        with explained():
            dist.all_gather_object(found, value, group=self.patient if patient else None)
        return found

    def first(self, make: Callable[[], T]) -> T:
        """Let the process that writes make something, and return it in all; its errors as well.

        Raises:
            KiloDeltaError: what `make` raises, in every process.
            OutputError: a process has ended.
        """
        if self.count == 1:
            return make()
        made, error = _attempt(make) if self.writes else (None, None)
        made, error = self.gather((made, error), patient=True)[0]
        if error is not None:
            raise _of_all(error)
        return made  # type: ignore[return-value]

    def agree(self, make: Callable[[], T]) -> T:
        """Let every process make something of its own; where one cannot, all raise its error.

        Raises:
            KiloDeltaError: what `make` raises in any process; of several the first one's.
            OutputError: a process has ended.
        """
        if self.count == 1:
            return make()
        made, error = _attempt(make)
        errors = self.gather(error)
        for problem in errors:
            if problem is not None:
                raise _of_all(problem) from error
        return made  # type: ignore[return-value]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Add up tensors over all processes, in place.

        Raises:
            OutputError: one of them has ended.
        """
        if self.count == 1:
            return
        with explained():
            for tensor in tensors:
                dist.all_reduce(tensor)

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Give every process the first one's values, in place: sums may differ between machines.

        Raises:
            OutputError: one of them has ended.
        """
        if self.count == 1:
            return
        values = self.gather([t.detach().cpu() for t in tensors] if self.writes else None)[0]
        assert values is not None  # the first process gave them
        for tensor, value in zip(tensors, values, strict=True):
            tensor.data.copy_(value)

    def any(self, answer: bool) -> bool:
        """Return whether any process says yes."""
        return any(self.gather(answer))

    def least(self, number: int) -> int:
        """Return the least number of all processes."""
        return min(self.gather(number))


ALONE = Ranks()


def _attempt(make: Callable[[], T]) -> tuple[T | None, KiloDeltaError | None]:
    try:
        return make(), None
    except KiloDeltaError as problem:
        return None, problem


def _of_all(error: KiloDeltaError) -> KiloDeltaError:
    """Mark an error as one that every process raises, so that one of them says it."""
    error.is_local = False
    return error


@contextmanager
def one_voice(ranks: Ranks) -> Iterator[None]:
    """Mark errors that this process alone raises, and name the end of another in any exchange.

    Layers whose weights are sharded exchange them on their own, where nothing catches an error.
    """
    try:
        yield
    except KiloDeltaError as error:
        if ranks.count > 1 and error.is_local is None:
            error.is_local = True
        raise
    except RuntimeError as problem:
        if ranks.count == 1 or not _is_of_exchange(problem):
            raise
        ended = _ended()
        ended.is_local = True
        raise ended from problem


@contextmanager
def explained() -> Iterator[None]:
    """Turn what torch raises when a connection ends into a sentence."""
    try:
        yield
    except RuntimeError as problem:
        raise _ended() from problem


def _ended() -> OutputError:
    return OutputError(
        "another process of this run has ended, so nothing more is written",
        fix="look at what it said; give --resume to go on where the run was written last",
    )


def _is_of_exchange(problem: RuntimeError) -> bool:
    """Return whether an error comes of the connection to another process."""
    text = str(problem)
    return isinstance(problem, dist.DistError) or "gloo" in text or "NCCL" in text
