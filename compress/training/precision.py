"""How coefficients are rounded: chosen when quantised training begins, kept in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from kilodelta.compress.training.quantise_ste import check_bits, largest_mantissa
from kilodelta.format.coefficients import Scale
from kilodelta.format.methods import Method
from kilodelta.format.targets import Target


@dataclass(frozen=True, kw_only=True)
class Precision:
    """`bits`, the largest mantissa of a scale, the scales that are fixed by name instead of
    following the values, and the method as the file will name it."""

    method: Method
    bits: int
    c_max: int
    fixed: Mapping[str, Scale] = field(default_factory=dict)


def choose(method: Method, targets: Sequence[Target], bits: int) -> Precision:
    """The finest rounding that is exact whatever the coefficients.

    Raises:
        InputError: the method cannot have so many bits.
    """
    check_bits(method, bits)
    c_max = min(largest_mantissa(method, target, bits) for target in targets)
    return Precision(method=method, bits=bits, c_max=c_max)


def to_numbers(precision: Precision | None) -> Tensor:
    """int64 (5,): bits (0 for none), c_max, anchor, c and e of theta's fixed scale."""
    if precision is None:
        return torch.zeros(5, dtype=torch.int64)
    theta = precision.fixed.get("theta", Scale(0, 0))
    anchor = getattr(precision.method, "anchor", 0)
    return torch.tensor([precision.bits, precision.c_max, anchor, theta.c, theta.e])


def from_numbers(method: Method, numbers: Tensor) -> Precision | None:
    """The inverse of `to_numbers`."""
    bits, c_max, anchor, c, e = (int(number) for number in numbers)
    if not bits:
        return None
    named: Any = method
    if any(option.name == "anchor" for option in fields(named)):
        named = replace(named, anchor=anchor)
    fixed = {"theta": Scale(c, e)} if c else {}
    return Precision(method=named, bits=bits, c_max=c_max, fixed=fixed)
