"""How much work a file asks for, estimated before any of it is done.

A file of a few kilobytes says how large its factors are: NOLA's rank and bases cost no bytes. The
root of the result refuses a wrong file only after the work, so `Delta.bind` asks here first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kilodelta.errors import FileError
from kilodelta.format.form import Form
from kilodelta.format.targets import Target

DRAW = 100
"""Multiply-adds that take as long as one call of a random generator and the use of its bits."""

SECOND = 7e9
"""Multiply-adds in a second of one core, roughly."""

PER_WEIGHT = 4096
"""Operations per weight that a file may ask for. One of full rank (RandLoRA) may ask for as many
more as the matrix's shorter side is long, which are the multiply-adds of its product."""

ALWAYS = 3e10
"""Operations that any file may ask for, some four seconds of one core."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the expansion of a delta takes."""

    draws: int
    """Calls of a random generator."""
    products: int
    """Multiply-adds of the factors' products."""
    allowed: float
    """Operations that suit the size of the base."""

    @property
    def operations(self) -> int:
        """Multiply-adds, and what takes as long."""
        return self.products + DRAW * self.draws

    @property
    def seconds(self) -> float:
        """The time on one core, roughly."""
        return self.operations / SECOND


def estimate(form: Form, targets: Sequence[Target]) -> Work:
    """Estimate the work of expanding and merging all targets, from options and shapes alone.

    Example:
        >>> from kilodelta.format.methods import Nola
        >>> square = Target(name="w", dtype="F32", shape=(512, 512), transposed=False, index=0)
        >>> estimate(Nola(rank=8, bases=256), [square])
        Work(draws=16384, products=2097152, allowed=30000000000.0)
    """
    products = draws = 0
    suits = 0.0
    for target in targets:
        out, in_ = target.matrix
        products += out * in_ * form.inner(target)
        draws += form.draws(target)
        suits += out * in_ * (PER_WEIGHT + (min(out, in_) if form.full_rank else 0))
    return Work(draws=draws, products=products, allowed=max(ALWAYS, suits))


def check(form: Form, targets: Sequence[Target], max_work: float | None = None) -> None:
    """Refuse a file that asks for more work than allowed.

    Args:
        form: the file's method.
        targets: in the base.
        max_work: operations; None takes what suits the base's size.

    Raises:
        FileError: it does.
    """
    work = estimate(form, targets)
    limit = work.allowed if max_work is None else max_work
    if work.operations > limit:
        raise FileError(
            f"{form.name} of rank {form.rank} would take {work.operations:.2g} operations here,"
            f" about {work.seconds:.0f} s of one core; {limit:.2g} are allowed",
            fix="a small file can ask for this by mistake or malice: if you trust it, give"
            f" --max-work {_up(work.operations):.1e}, or in Python"
            f" kilodelta.load(path, base=..., max_work={_up(work.operations):.1e})",
        )


def _up(operations: int) -> float:
    """Round up so that the printed limit suffices."""
    return operations * 1.1
