"""From trained coefficients to the factors of an update, in torch: the base class of all methods.

A subclass is a pure function of (method, seed, targets) and of the coefficients' values. It keeps
one copy per device of the random bases that it draws, packed where they would be large. The
subclasses are in `kilodelta/format/methods/*/train.py`; each method's specification names its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kilodelta.compress.training.packed import PerDevice
from kilodelta.compress.training.precision import FixedOptions, Precision
from kilodelta.compress.training.trainables import GroupSet, Start
from kilodelta.compress.training.update import FactoredUpdate
from kilodelta.exact.bases import Stream
from kilodelta.format.methods import Method, load_part
from kilodelta.format.targets import Target


@dataclass(frozen=True, kw_only=True)
class CoefficientValues:
    """The coefficients of all targets, exact or rounded."""

    shared: GroupSet
    own: Sequence[GroupSet]
    precision: Precision | None

    def all(self, name: str) -> list[Tensor]:
        """Return a group's value, target by target."""
        return [groups.value(name, self.precision) for groups in self.own]

    def of(self, target: int, name: str) -> Tensor:
        """Return a group's value for one target."""
        return self.own[target].value(name, self.precision)

    def of_file(self, name: str) -> Tensor:
        """Return the value of a group that the file has once."""
        return self.shared.value(name, self.precision)


class TrainableFactors(ABC):
    """What one method does with its coefficients, differentiably."""

    settled: ClassVar[FixedOptions] = FixedOptions()
    """What `settle` chooses."""

    method: Any

    def __init__(self, method: Method, seed: int, targets: Sequence[Target]) -> None:
        self.method = method
        self.seed = seed
        self.stream = Stream(seed)
        self.targets = tuple(targets)

    @property
    def constants(self) -> Sequence[PerDevice]:
        """What is drawn from Philox, and shared by all targets."""
        return ()

    def draw(self, device: torch.device) -> None:
        """Draw the constants now: a compiler cannot trace the drawing."""
        for constant in self.constants:
            constant.on(device)

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave the constants out of pickles and copies: they can be drawn again."""
        return type(self), (self.method, self.seed, self.targets)

    def start_shared(self, generator: torch.Generator) -> Mapping[str, Start]:
        """Return how the file's shared groups begin."""
        return {}

    @abstractmethod
    def start(self, target: Target, generator: torch.Generator) -> Mapping[str, Start]:
        """Return how a target's groups begin: with an update of zero, or nearly so."""

    def start_wide(self, shared: GroupSet, own: Sequence[GroupSet], sizes: Sequence[float]) -> bool:
        """Begin with updates of given sizes, where the method's updates do not begin at zero.

        Args:
            shared: the groups that the file has once, as they begin; changed.
            own: those of each target, likewise.
            sizes: the root mean square of each target's update.

        Returns:
            Whether they begin so.
        """
        return False

    def prepare(self, values: CoefficientValues) -> tuple[Tensor, ...]:
        """Compute what all targets share in one forward pass."""
        return ()

    @abstractmethod
    def update(
        self, prepared: tuple[Tensor, ...], values: CoefficientValues, index: int
    ) -> FactoredUpdate:
        """Compute the update of target `index`, float32."""

    def widest(self) -> Method:
        """Return the method with those options that `settle` may choose at their largest."""
        method: Method = self.method
        return method

    def settle(self, shared: GroupSet, precision: Precision) -> Precision:
        """Return the precision with what the method fixes when quantised training begins."""
        return precision


def factors_of(method: Method, seed: int, targets: Sequence[Target]) -> TrainableFactors:
    """Make a method's trainable factors."""
    factors: TrainableFactors = load_part(method.trainable)(method, seed, targets)
    return factors


def uniform(generator: torch.Generator, shape: tuple[int, ...], bound: float) -> Tensor:
    """Draw float32 numbers, uniform in +-bound."""
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound
