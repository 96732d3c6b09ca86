"""Let two pieces of work take turns in one thread, so that what both hash is hashed together.

A piece of work is a generator: it yields a hash and the bytes that this hash is to take, and goes
on when it has. Two streams are hashed in the time of one where the processor can (`exact.sha256`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, Generic, TypeVar

from kilodelta.exact.sha256 import update_both
from kilodelta.files.identity import Hash

T = TypeVar("T")
R = TypeVar("R")

Hashing = Generator[tuple[Hash, Any], None, R]
"""Yields hashes with buffers, which stay as they are until it is resumed; returns a result."""


class _Turn(Generic[R]):
    """One piece of work, and what it waits for."""

    result: R

    def __init__(self, work: Hashing[R]) -> None:
        self._work, self.ended = work, False
        self.resume()

    def resume(self) -> None:
        try:
            self.state, data = next(self._work)
        except StopIteration as end:
            self.ended, self.result = True, end.value
        else:
            self.left = memoryview(data).cast("B")

    def took(self, count: int) -> None:
        """Say that the hash has taken so many bytes more."""
        self.left = self.left[count:]
        if not self.left:
            self.resume()


def finish(works: Sequence[Hashing[R]]) -> list[R]:
    """Do one piece of work, or two in turns; return their results.

    Example:
        >>> from kilodelta.exact import sha256
        >>> def digest(text):
        ...     state = sha256.new()
        ...     yield state, text
        ...     return state.hexdigest()[:8]
        >>> finish([digest(b"abc"), digest(b"")])
        ['ba7816bf', 'e3b0c442']
    """
    turns = [_Turn(work) for work in works]
    if len(turns) == 2:
        first, second = turns
        while not (first.ended or second.ended):
            count = min(len(first.left), len(second.left))
            update_both(first.state, first.left[:count], second.state, second.left[:count])
            first.took(count)
            second.took(count)
    for turn in turns:
        while not turn.ended:
            turn.state.update(turn.left)
            turn.took(len(turn.left))
    return [turn.result for turn in turns]


def paired(
    items: Sequence[T], weight: Callable[[T], int], fits: Callable[[T], bool], threads: int
) -> list[tuple[T, ...]]:
    """Put items of about the same weight in pairs, the heaviest first.

    Args:
        items: any.
        weight: of an item, in any unit.
        fits: whether an item may share a thread.
        threads: that will work: a pair takes no more than its share, so that none is idle.
    """
    share = sum(map(weight, items)) / threads
    order = sorted(range(len(items)), key=lambda i: -weight(items[i]))
    out: list[tuple[T, ...]] = []
    waiting: T | None = None
    for item in (items[i] for i in order):
        if not fits(item):
            out.append((item,))
        elif waiting is None:
            waiting = item
        elif weight(waiting) + weight(item) > share:
            out.append((waiting,))
            waiting = item
        else:
            out.append((waiting, item))
            waiting = None
    return out if waiting is None else [*out, (waiting,)]
