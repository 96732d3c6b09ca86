"""How a user wants a model compressed: options, their defaults, and their spelling."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from kilodelta.compress.distill import budget as budgets
from kilodelta.errors import InputError
from kilodelta.format.methods import METHODS, Method


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to compress; what is None is chosen by rule."""

    budget: int | None = None
    method: Method | str | None = None
    """A name alone leaves the size to the budget."""
    bits: int | None = None
    targets: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    extras: str = "auto"
    steps: int = 800
    rate: float | None = None
    batch: int = 32
    held_out: int | None = None
    max_length: int | None = None
    field: str = "text"
    limit: int | None = None
    min_agreement: float | None = None
    seed: int = 0
    name: str = ""
    labels: str | None = None
    """A text file, one label or query a line, for models that embed texts: what counts is which
    of them an input is nearest to, by the base model's embeddings of them."""
    model: str | None = None
    """`package.module:function` that builds the module, where the folders are bare checkpoints."""


DEFAULT_BUDGET = 20_000


def options_from(
    *,
    budget: str | None,
    method: str | None,
    rank: int | None,
    bases: int | None,
    bits: str | None,
    lr: float | None,
    **others: Any,
) -> Options:
    """Options from what a user types.

    Raises:
        InputError: a size that is none, or an option that the method does not have.
    """
    if method is None and (rank or bases):
        raise InputError(
            "--rank and --bases belong to a method", fix="add --method, or give --budget alone"
        )
    sized = method is None or not (rank or bases or budget is None)
    return Options(
        budget=None if budget is None else budgets.parse_bytes(budget),
        method=method if sized else _method(method or "", rank=rank, bases=bases),
        bits=None if bits is None else int(bits),
        rate=lr,
        **others,
    )


def _method(name: str, **wanted: int | None) -> Method:
    kind: Any = METHODS[name]
    given = {key: value for key, value in wanted.items() if value is not None}
    known = {option.name for option in fields(kind)}
    if unknown := sorted(set(given) - known):
        raise InputError(f"{name} has no {unknown[0]}", fix=f"its options: {', '.join(known)}")
    found: Method = kind(**given)
    return found
