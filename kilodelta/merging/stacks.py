"""The factors of many targets at once, for whoever needs them all in milliseconds.

NOLA's targets share their bases. Drawing a base takes longer than adding it up, so the bases are
drawn once for all targets whose sides are equally long.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kilodelta.exact.bases import BLOCK, Ints, Role
from kilodelta.files import parallel
from kilodelta.format.delta import Delta
from kilodelta.format.methods import Coefficients, Nola
from kilodelta.progress import Meter, silent

FEW = 1 << 29
"""Steps of mixing, some 15 ms of one core, below which threads cost more than they bring: each one
that comes back from a kernel waits for the interpreter."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The left factors (n, out, K) of several targets, or their right ones (n, K, in), integers."""

    names: Sequence[str]
    is_left: bool
    values: Ints


@dataclass(frozen=True, kw_only=True)
class _Side:
    """The same before it is computed."""

    names: Sequence[str]
    is_left: bool
    length: int


def stacks(delta: Delta, names: Sequence[str], *, threads: int | None = None) -> list[Stack]:
    """Both factors of all these targets, each what `delta.factors` says.

    Args:
        threads: cores to use; by default all, or one where there is little to do.
    """
    sides, read = _sides(delta, names), {name: delta.coefficients(name) for name in names}
    cost = delta.method.bases if isinstance(delta.method, Nola) else BLOCK
    steps = cost * delta.method.rank * sum(side.length * len(side.names) for side in sides)
    return parallel.run(
        lambda side: Stack(
            names=side.names, is_left=side.is_left, values=_values(delta, side, read)
        ),
        sides,
        Meter("factors", len(sides), "sides", silent),
        weight=lambda side: side.length * len(side.names),
        threads=threads or (1 if steps < FEW else os.cpu_count()),
    )


def _sides(delta: Delta, names: Iterable[str]) -> list[_Side]:
    """What is computed at once: NOLA's sides of one length, any other method's each alone."""
    alike: dict[tuple[bool, int, str], list[str]] = {}
    for name in names:
        alone = "" if isinstance(delta.method, Nola) else name
        out, in_ = delta.targets[name].matrix
        alike.setdefault((True, out, alone), []).append(name)
        alike.setdefault((False, in_, alone), []).append(name)
    return [
        _Side(names=several, is_left=is_left, length=length)
        for (is_left, length, _), several in alike.items()
    ]


def _values(delta: Delta, side: _Side, read: Mapping[str, Coefficients]) -> Ints:
    method, long = delta.method, range(side.length)
    if isinstance(method, Nola):
        group, role = ("beta", Role.NOLA_B) if side.is_left else ("alpha", Role.NOLA_A)
        place = (long, range(method.rank)) if side.is_left else (range(method.rank), long)
        lines = np.stack([read[name][group] for name in side.names])
        return delta.stream.mix_many(role, lines, *place)
    (name,) = side.names
    target, q = delta.targets[name], read[name]
    if side.is_left:
        return method.left(q, target, delta.stream, long)[None]
    return method.right(q, target, delta.stream)[None]
