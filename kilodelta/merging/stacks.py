"""Compute the factors of many targets at once, for users that need them all in milliseconds.

NOLA's targets share their bases. Drawing a base takes longer than adding it up, so the bases are
drawn once for all targets whose sides are equally long.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kilodelta import parallel
from kilodelta.exact.bases import BLOCK, Ints
from kilodelta.format.delta import Delta
from kilodelta.format.methods import Coefficients
from kilodelta.progress import Meter, silent

FEW = 1 << 29
"""Signs drawn, some 15 ms of one core, below which threads cost more than they bring: each one that
comes back from a kernel waits for the interpreter."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The left factors (n, out, K) of several targets, or their right ones (n, K, in), integers."""

    names: Sequence[str]
    is_left: bool
    values: Ints


@dataclass(frozen=True, kw_only=True)
class _Side:
    """A stack before it is computed."""

    names: Sequence[str]
    is_left: bool
    length: int
    """Rows of the left factors, or columns of the right ones."""


def stacks(delta: Delta, names: Sequence[str], *, threads: int | None = None) -> list[Stack]:
    """Compute both factors of all these targets, each as `delta.factors` gives it.

    Args:
        delta: bound to its base, of an exact method.
        names: its targets that are wanted.
        threads: cores to use; by default all, or one where there is little to do.

    Raises:
        InputError: a name is no target, or the file is a compatibility form.
    """
    sides, q = _sides(delta, names), {name: delta.coefficients(name) for name in names}
    signs = BLOCK * sum(delta.method.draws(delta.target(name)) for name in names)
    return parallel.run(
        lambda side: Stack(names=side.names, is_left=side.is_left, values=_values(delta, side, q)),
        sides,
        Meter("factors", len(sides), "sides", silent),
        weight=lambda side: side.length * len(side.names),
        threads=threads or (1 if signs < FEW else os.cpu_count()),
    )


def _sides(delta: Delta, names: Iterable[str]) -> list[_Side]:
    """Group the sides that are computed at once: those of one length, if bases are shared."""
    alike: dict[tuple[bool, int, str], list[str]] = {}
    for name in names:
        # An empty text groups all names of one length; a name keeps its target by itself.
        alone = "" if delta.method.shares_bases else name
        out, in_ = delta.target(name).matrix
        alike.setdefault((True, out, alone), []).append(name)
        alike.setdefault((False, in_, alone), []).append(name)
    return [
        _Side(names=several, is_left=is_left, length=length)
        for (is_left, length, _), several in alike.items()
    ]


def _values(delta: Delta, side: _Side, q: Mapping[str, Coefficients]) -> Ints:
    factors = delta.method.lefts if side.is_left else delta.method.rights
    targets = [delta.target(name) for name in side.names]
    return factors([q[name] for name in side.names], targets, delta.stream)
