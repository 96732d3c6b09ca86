"""The integer factors of many targets at once, for whoever needs them all in milliseconds.

NOLA's targets share their bases. Drawing a base takes longer than adding it up, so the bases are
drawn once for all targets whose sides are equally long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kilodelta.format.bases import Ints, Role
from kilodelta.format.delta import Delta, Factors
from kilodelta.format.methods import Nola


def factors(delta: Delta, names: Sequence[str]) -> dict[str, Factors]:
    """`delta.factors` of each of these targets."""
    if not isinstance(delta.method, Nola):
        return {name: delta.factors(name) for name in names}
    read = {name: delta.coefficients(name) for name in names}
    alphas = {name: q["alpha"] for name, q in read.items()}
    betas = {name: q["beta"] for name, q in read.items()}
    right, left = _sides(delta, Role.NOLA_A, alphas), _sides(delta, Role.NOLA_B, betas)
    return {name: _factors(delta, name, left[name], right[name]) for name in names}


def _sides(delta: Delta, role: Role, q: Mapping[str, Ints]) -> dict[str, Ints]:
    """One factor of every target: of role B (out, r), of role A (r, in)."""
    by_length: dict[int, list[str]] = {}
    for name in q:
        out, in_ = delta.targets[name].matrix
        by_length.setdefault(in_ if role == Role.NOLA_A else out, []).append(name)
    found: dict[str, Ints] = {}
    for length, names in by_length.items():
        sides = range(delta.method.rank), range(length)
        rows, columns = sides if role == Role.NOLA_A else sides[::-1]
        lines = np.stack([q[name] for name in names])
        mixed = delta.stream.mix_many(role, lines, rows, columns)
        found.update(zip(names, mixed, strict=True))
    return found


def _factors(delta: Delta, name: str, left: Ints, right: Ints) -> Factors:
    c, e = delta.scale(name)
    return Factors(left=left, right=right, c=c, e=e)
