"""From bytes to a method: what to spend a budget on.

The rule comes from accuracy curves of a sentence encoder distilled at many sizes: with less than
a LoRA of rank 1 in 4 bits costs, one vector shared by all layers (Uni-LoRA) keeps most; from there
on LoRA with 4-bit factors, of the largest rank that fits, does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from kilodelta.errors import InputError
from kilodelta.format.coefficients import groups_size
from kilodelta.format.manifest import MAX_BASES
from kilodelta.format.methods import Lora, Method, UniLora
from kilodelta.format.targets import Target

BITS = 4
UNILORA_RANK = 4
SMALLEST = 64
"""Coefficients below which a budget is too small to be worth a file."""

_UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 10**6, "kib": 1024, "mib": 1 << 20}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What to train and how to store it."""

    method: Method
    bits: int


def parse_bytes(text: str) -> int:
    """`20KB`, `1.5 MB`, `8KiB` or `4096` to bytes; KB is 1000.

    Raises:
        InputError: it is none of these.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    if not found or found[2].lower() not in _UNITS:
        raise InputError(f"{text!r} is no size", fix="give bytes, or for example 20KB or 1.5MB")
    return int(float(found[1]) * _UNITS[found[2].lower()])


def size_of(method: Method, targets: Sequence[Target], bits: int) -> int:
    """Bytes of a method's packed coefficients."""
    own = (groups_size(method.groups(target), bits) for target in targets)
    return groups_size(method.shared(), bits) + sum(own)


def choose(budget: int, overhead: int, targets: Sequence[Target]) -> Choice:
    """The method that a budget is best spent on.

    Args:
        budget: bytes of the whole file.
        overhead: bytes of everything but coefficients (header, manifest, extras).

    Raises:
        InputError: the budget does not even hold the rest of the file.
    """
    left = budget - overhead
    if left * 8 // BITS < SMALLEST:
        raise InputError(
            f"a budget of {budget} bytes leaves {max(left, 0)} for coefficients; the rest of the "
            f"file takes {overhead}",
            fix="raise --budget, or store fewer tensors whole with --extras none",
        )
    rank = left // size_of(Lora(rank=1), targets, BITS)
    if rank >= 1:
        widest = min(min(target.matrix) for target in targets)
        return Choice(method=Lora(rank=min(rank, widest)), bits=BITS)
    bases = min(left * 8 // BITS, MAX_BASES)
    rank = min(UNILORA_RANK, *(max(target.matrix) for target in targets))
    return Choice(method=UniLora(rank=rank, bases=bases), bits=BITS)
