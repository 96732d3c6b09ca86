"""The trained numbers of a delta: one float32 parameter per coefficient group.

A group's value is `gain * parameter`; the gain is a constant with which a learning rate that suits
LoRA suits every method. With a precision set, the layers compute with the rounded value that the
file will hold (`kilodelta.compress.training.quantise_ste`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kilodelta.compress.training.precision import Precision
from kilodelta.compress.training.quantise_ste import (
    Rounded,
    as_scale,
    constants,
    round_group,
    round_with,
    scale_near,
    straight_through,
)
from kilodelta.errors import InputError
from kilodelta.format.packing import Group, storage
from kilodelta.format.quantise import Quantised
from kilodelta.format.targets import Target


@dataclass(frozen=True, kw_only=True)
class Start:
    """How a group begins: the parameter's values (on the CPU, float32) and its gain."""

    values: Tensor
    gain: float = 1.0


class GroupSet(nn.Module):
    """The groups of one target, or those that the whole file has once."""

    def __init__(self, groups: Sequence[Group], starts: Mapping[str, Start]) -> None:
        super().__init__()
        self.groups = tuple(groups)
        self.gains = {name: start.gain for name, start in starts.items()}
        for name, start in starts.items():
            self.register_parameter(name, nn.Parameter(start.values.clone()))

    def exact(self, name: str) -> Tensor:
        """Return a group's value as trained, float32; a group without coefficients is a size."""
        parameter: Any = self._parameters[name]
        # A size is trained as its logarithm, so that it stays positive.
        number = parameter.float().exp() if parameter.ndim == 0 else parameter.float()
        value: Tensor = number * self.gains[name]
        return value

    def value(self, name: str, precision: Precision | None) -> Tensor:
        """Return a group's value to compute with: rounded as in the file, if a precision is set."""
        value = self.exact(name)
        if precision is None:
            return value
        return straight_through(value, self.rounded(name, precision).value)

    def rounded(self, name: str, precision: Precision) -> Rounded:
        """Round a group's value to integers with a scale."""
        value = self.exact(name)
        if value.ndim == 0:
            scale = scale_near(value.detach().double(), precision.c_max)
            return Rounded(torch.ones_like(value), *scale)
        if name in precision.fixed:
            scale = constants(precision.fixed[name], value.device)
            return round_with(value, precision.bits, *scale)
        return round_group(value, precision.bits, precision.c_max)

    def quantised(self, precision: Precision, where: str) -> dict[str, Quantised]:
        """Round the groups as the file holds them.

        Args:
            precision: how.
            where: whose groups they are, for the message.

        Raises:
            InputError: a coefficient is not finite.
        """
        return {group.name: self._quantised(group, precision, where) for group in self.groups}

    def _quantised(self, group: Group, precision: Precision, where: str) -> Quantised:
        if not bool(self.exact(group.name).isfinite().all()):
            raise InputError(
                f"coefficients {group.name!r} of {where} are not finite",
                fix="train with a lower learning rate, or go back to an earlier state",
            )
        rounded = self.rounded(group.name, precision)
        q = rounded.q.expand(group.shape).cpu().numpy()
        integers = q.astype(storage(precision.bits))
        return Quantised(q=integers, scale=as_scale(rounded.c, rounded.e))


def submodule_name(target: Target) -> str:
    """Turn a target's name into a module's name, which must not hold dots."""
    return target.name.replace(".", "/")
