"""How coefficients are rounded: chosen when quantised training begins, kept in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from kilodelta.errors import InputError
from kilodelta.exact.bounds import EXACT
from kilodelta.format.methods import Method
from kilodelta.format.packing import largest
from kilodelta.format.quantise import Scale
from kilodelta.format.targets import Target

OLDEST = 5
"""Numbers that a training checkpoint of kilodelta 0.1 has, for any method."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How every group is rounded."""

    method: Method
    """The method as the file will name it."""
    bits: int
    c_max: int
    """The largest mantissa of a scale."""
    fixed: Mapping[str, Scale] = field(default_factory=dict)
    """Scales, by group, that do not follow the values."""


@dataclass(frozen=True, kw_only=True)
class FixedOptions:
    """What a method chooses anew when quantised training begins."""

    options: tuple[str, ...] = ()
    """Integer options."""
    groups: tuple[str, ...] = ()
    """Groups whose scale is fixed from then on."""


def choose(method: Method, widest: Method, targets: Sequence[Target], bits: int) -> Precision:
    """Choose the finest rounding that is exact for all coefficients.

    Args:
        method: as it is trained.
        widest: the same with the largest options that it may settle on.
        targets: whose updates must be exact.
        bits: of a coefficient.

    Raises:
        InputError: the method cannot have so many bits, or no scale is small enough.
    """
    if bits not in method.bits:
        raise InputError(
            f"{method.name} coefficients cannot have {bits} bits",
            fix=f"choose one of {', '.join(map(str, method.bits))}",
        )
    c_max = min(largest_mantissa(widest, target, bits) for target in targets)
    return Precision(method=method, bits=bits, c_max=c_max)


def largest_mantissa(method: Method, target: Target, bits: int) -> int:
    """Return the largest c that keeps every update exact for all coefficients, at most 255.

    Args:
        method: with the largest options that training may choose.
        target: whose updates they are.
        bits: of a coefficient.

    Raises:
        InputError: not even c = 1 does.
    """
    groups = (*method.shared(), *method.groups(target))
    full = {g.name: np.full(g.shape, largest(bits), np.int64) for g in groups}
    room = (EXACT - 1) // method.bound(full)
    scales = len(method.scales())
    c_max = next((c for c in range(255, 0, -1) if c**scales <= room), 0)
    if c_max == 0:
        raise InputError(
            f"{method.name} with {bits}-bit coefficients could leave the range of exact sums"
            f" on {target.name}",
            fix="use fewer bits, fewer bases or a smaller rank",
        )
    return c_max


def to_numbers(precision: Precision | None, settled: FixedOptions) -> Tensor:
    """Write a precision as int64 numbers, for a training checkpoint.

    Returns:
        Bits (0 for no rounding), c_max, each settled option, c and e of each settled group's scale
        (0 where it is not fixed), and zeros up to five numbers.
    """
    count = 2 + len(settled.options) + 2 * len(settled.groups)
    numbers = [0] * count
    if precision is not None:
        scales = [precision.fixed.get(group, Scale(0, 0)) for group in settled.groups]
        numbers = [precision.bits, precision.c_max]
        numbers += [getattr(precision.method, option) for option in settled.options]
        numbers += [number for scale in scales for number in (scale.c, scale.e)]
    return torch.tensor(numbers + [0] * (OLDEST - count), dtype=torch.int64)


def from_numbers(numbers: Tensor, method: Method, settled: FixedOptions) -> Precision | None:
    """Read what `to_numbers` wrote, for a method as it is trained."""
    bits, c_max, *rest = (int(number) for number in numbers)
    if not bits:
        return None
    options = dict(zip(settled.options, rest, strict=False))
    pairs = rest[len(options) :]
    scales = (Scale(c, e) for c, e in zip(pairs[::2], pairs[1::2], strict=False))
    by_group = zip(settled.groups, scales, strict=False)
    return Precision(
        method=replace(method, **options),
        bits=bits,
        c_max=c_max,
        fixed={group: scale for group, scale in by_group if scale.c},
    )
