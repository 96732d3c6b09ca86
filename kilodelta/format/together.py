"""The integer factors of many targets at once, for whoever needs them all in milliseconds.

NOLA's targets share their bases. Drawing a base takes longer than adding it up, so the bases are
drawn once for all targets whose sides are equally long.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from kilodelta.format import parallel
from kilodelta.format.bases import Ints, Role
from kilodelta.format.delta import Delta, Factors
from kilodelta.format.methods import Nola
from kilodelta.format.methods.base import Coefficients
from kilodelta.progress import Meter, silent


def factors(
    delta: Delta, names: Sequence[str], *, threads: int | None = None
) -> dict[str, Factors]:
    """`delta.factors` of each of these targets.

    Args:
        threads: cores to use; all by default.
    """
    if isinstance(delta.method, Nola):
        return _nola(delta, names, threads)
    count = max(1, min(len(names), threads or os.cpu_count() or 1))
    shares = [names[start::count] for start in range(count)]
    found: dict[str, Factors] = {}
    for part in parallel.run(
        lambda share: {name: delta.factors(name) for name in share},
        shares,
        Meter("factors", len(shares), "shares", silent),
        weight=len,
        threads=threads,
    ):
        found |= part
    return {name: found[name] for name in names}


def _nola(delta: Delta, names: Sequence[str], threads: int | None) -> dict[str, Factors]:
    read = {name: delta.coefficients(name) for name in names}
    sides: dict[tuple[Role, int], list[str]] = {}
    for name in names:
        out, in_ = delta.targets[name].matrix
        sides.setdefault((Role.NOLA_B, out), []).append(name)
        sides.setdefault((Role.NOLA_A, in_), []).append(name)
    mixed = parallel.run(
        lambda side: _mixed(delta, *side, [read[name] for name in sides[side]]),
        list(sides),
        Meter("factors", len(sides), "sides", silent),
        weight=lambda side: side[1] * len(sides[side]),
        threads=threads,
    )
    found = {
        (role, name): factor
        for (role, length), several in zip(sides, mixed, strict=True)
        for name, factor in zip(sides[role, length], several, strict=True)
    }
    return {
        name: _factors(delta, name, found[Role.NOLA_B, name], found[Role.NOLA_A, name])
        for name in names
    }


def _mixed(delta: Delta, role: Role, length: int, read: Sequence[Coefficients]) -> Ints:
    """One factor of targets whose sides have one length: role B (n, out, r), role A (n, r, in)."""
    sides = range(delta.method.rank), range(length)
    rows, columns = sides if role == Role.NOLA_A else sides[::-1]
    lines = np.stack([q["alpha" if role == Role.NOLA_A else "beta"] for q in read])
    return delta.stream.mix_many(role, lines, rows, columns)


def _factors(delta: Delta, name: str, left: Ints, right: Ints) -> Factors:
    c, e = delta.scale(name)
    return Factors(left=left, right=right, c=c, e=e)
