"""From trained coefficients to the factors of an update, in torch: what one class a method does.

The classes are pure functions of (method, seed, targets) and of the coefficients' values; what they
draw from Philox they keep once a device, packed where it would be large.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kilodelta.compress.training.packed import PerDevice
from kilodelta.compress.training.precision import Precision
from kilodelta.compress.training.trainables import GroupSet, Start
from kilodelta.compress.training.update import Update
from kilodelta.exact.bases import Stream
from kilodelta.format.methods import Method
from kilodelta.format.targets import Target


@dataclass(frozen=True, kw_only=True)
class Values:
    """The coefficients of all targets, exact or rounded."""

    shared: GroupSet
    own: Sequence[GroupSet]
    precision: Precision | None

    def all(self, name: str) -> list[Tensor]:
        """A group's value, target by target."""
        return [groups.value(name, self.precision) for groups in self.own]

    def of(self, target: int, name: str) -> Tensor:
        """A group's value for one target."""
        return self.own[target].value(name, self.precision)

    def of_file(self, name: str) -> Tensor:
        """The value of a group that the file has once."""
        return self.shared.value(name, self.precision)


class Factors(ABC):
    """What one method does with its coefficients."""

    method: Any

    def __init__(self, method: Method, seed: int, targets: Sequence[Target]) -> None:
        self.method = method
        self.seed = seed
        self.stream = Stream(seed)
        self.targets = tuple(targets)

    @property
    def constants(self) -> Sequence[PerDevice]:
        """What is drawn, and what all targets share."""
        return ()

    def draw(self, device: torch.device) -> None:
        """Draw it now: a compiler cannot trace the drawing."""
        for constant in self.constants:
            constant.on(device)

    def __reduce__(self) -> tuple[Any, ...]:
        """What is drawn can be drawn again, so that it is neither pickled nor copied."""
        return type(self), (self.method, self.seed, self.targets)

    def start_shared(self, generator: torch.Generator) -> Mapping[str, Start]:
        """How the file's shared groups begin."""
        return {}

    @abstractmethod
    def start(self, target: Target, generator: torch.Generator) -> Mapping[str, Start]:
        """How a target's groups begin: with an update of zero, or nearly so."""

    def prepare(self, values: Values) -> tuple[Tensor, ...]:
        """What all targets share in one forward pass, computed once for it."""
        return ()

    @abstractmethod
    def update(self, prepared: tuple[Tensor, ...], values: Values, index: int) -> Update:
        """That of a target, float32."""

    def settle(self, shared: GroupSet, precision: Precision) -> Precision:
        """The precision with what a method fixes when quantised training begins."""
        return precision


def uniform(generator: torch.Generator, shape: tuple[int, ...], bound: float) -> Tensor:
    """float32, uniform in +-bound."""
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound
