"""Choose a method and its size for a budget of bytes.

The rule comes from accuracy curves of a sentence encoder distilled at many sizes
(`benchmarks/fidelity.py`): one vector shared by all layers (Uni-LoRA) keeps most, also where the
bytes would buy a LoRA of rank 1 (90.9 against 90.3 % on Banking77 at 25 KB). Once they buy a
separate coefficient for every entry of its factors, there is nothing left to share, and LoRA takes
over. Four bits do as well as eight, for half the bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kilodelta.errors import InputError
from kilodelta.format.fields import MAX_BASES
from kilodelta.format.methods import METHODS, Lora, Method, UniLora
from kilodelta.format.packing import groups_size
from kilodelta.format.targets import Target

BITS = 4
"""Bits of a coefficient where nobody asks for others."""
SMALLEST = 64
"""Coefficients below which a budget is too small to be worth a file."""

Overhead = Callable[[Method], int]
"""From a method to the bytes of its file that are no coefficients: header, manifest, extras."""

_UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 10**6, "kib": 1024, "mib": 1 << 20}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What to train and how to store it."""

    method: Method
    bits: int


def parse_bytes(text: str) -> int:
    """Read a size in bytes; KB is 1000, KiB 1024.

    Raises:
        InputError: the text is no size, or less than a byte.

    Example:
        >>> parse_bytes("20KB"), parse_bytes("1.5 MB"), parse_bytes("8KiB"), parse_bytes("4096")
        (20000, 1500000, 8192, 4096)
    """
    parts = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([a-zA-Z]*)\s*", text)
    if not parts or parts[2].lower() not in _UNITS:
        raise InputError(f"{text!r} is no size", fix="give bytes, or for example 20KB or 1.5MB")
    count = int(float(parts[1]) * _UNITS[parts[2].lower()])
    if count < 1:
        raise InputError(
            f"a budget of {text.strip()} holds no file", fix="give bytes, or for example 20KB"
        )
    return count


def size_of(method: Method, targets: Sequence[Target], bits: int) -> int:
    """Count the bytes of a method's packed coefficients.

    Args:
        method: with all its options.
        targets: what it changes.
        bits: of a coefficient.
    """
    own = (groups_size(method.groups(target), bits) for target in targets)
    return groups_size(method.shared(), bits) + sum(own)


def choose(
    budget: int,
    overhead: Overhead,
    targets: Sequence[Target],
    *,
    bits: int = BITS,
    family: str | None = None,
) -> Choice:
    """Choose the method that a budget is best spent on.

    Args:
        budget: bytes of the whole file.
        overhead: bytes of it that are no coefficients, by method.
        targets: what is to change.
        bits: of a coefficient.
        family: the name of a method, where only its size is to be chosen.

    Raises:
        InputError: the budget does not hold the rest of the file and some coefficients.
    """
    families = (Lora.name, UniLora.name) if family is None else (family,)
    for name in families:
        method = _largest(name, budget, overhead, targets, bits)
        shared = family is None and name == Lora.name and method and method.rank < UniLora().rank
        if method is not None and not shared:
            return Choice(method=method, bits=bits)
    rest = overhead(METHODS[family or UniLora.name].usual())
    raise InputError(
        f"a budget of {budget} bytes leaves {max(budget - rest, 0)} for coefficients"
        f"{f' of {family}' if family else ''}; the rest of the file takes {rest}",
        fix="raise --budget, or store fewer tensors whole with --extras none",
    )


def check_fits(choice: Choice, budget: int, overhead: Overhead, targets: Sequence[Target]) -> None:
    """Check that a method given by hand keeps to a budget given by hand.

    Args:
        choice: the method with its bits.
        budget: bytes of the whole file.
        overhead: bytes of it that are no coefficients, by method.
        targets: what is to change.

    Raises:
        InputError: it does not.
    """
    needed = overhead(choice.method) + size_of(choice.method, targets, choice.bits)
    if needed > budget:
        raise InputError(
            f"{choice.method.name} of these options takes {needed} bytes, the budget is {budget}",
            fix="give a smaller --rank, --bases or --bits, or leave them to --budget",
        )


def _largest(
    family: str, budget: int, overhead: Overhead, targets: Sequence[Target], bits: int
) -> Method | None:
    """Return a method at the largest size that fits; None where none does."""
    kind, sides = METHODS[family], [target.matrix for target in targets]
    values = range(1, (min(map(min, sides)) if kind.bought == "rank" else MAX_BASES) + 1)

    def fits(value: int) -> bool:
        method = kind.of_size(value, sides)
        return overhead(method) + size_of(method, targets, bits) <= budget

    value = _last(fits, values) if kind.more_costs_more else _first(fits, values)
    if value is None or (kind.bought == "bases" and value < SMALLEST):
        return None
    return kind.of_size(value, sides)


def _last(holds: Callable[[int], bool], values: range) -> int | None:
    """Find by bisection the last value for which a predicate holds, or None.

    The predicate may turn from true to false once.
    """
    low, high = values.start - 1, values.stop - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low if low >= values.start else None


def _first(holds: Callable[[int], bool], values: range) -> int | None:
    """Find by bisection the smallest value from which a predicate holds; None if it never does."""
    before = _last(lambda value: not holds(value), values)
    first = values.start if before is None else before + 1
    return first if first < values.stop else None
