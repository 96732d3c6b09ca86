"""What an exact method is: options, an exact expansion, a bound, and the names of its other parts.

docs/add_a_method.md makes one step by step.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import numpy as np

from kilodelta.exact.bases import Stream
from kilodelta.exact.reference import Matrix
from kilodelta.format.form import Form
from kilodelta.format.packing import BITS, Ints
from kilodelta.format.targets import Shape, Target

Coefficients = Mapping[str, Ints]
"""A target's integer coefficients by group name, the file's shared groups among them."""

M = TypeVar("M", bound="Method")


@dataclass(frozen=True, kw_only=True)
class Method(Form):
    """One exact method: small integers and sign bases make integer factors, whose product is dQ.

    Everything that the rest of kilodelta asks about a method is said here. `trainable` and `on_gpu`
    name what needs torch, as `package.module:attribute`; it is imported when it is first used.
    """

    trainable: ClassVar[str]
    """Its `kilodelta.compress.training.factors.TrainableFactors`."""
    on_gpu: ClassVar[str] = ""
    """Its `kilodelta.merging.gpu.sides.Draws`; without one, factors are computed on the CPU and
    copied to the GPU."""
    roles: ClassVar[tuple[int, ...]] = ()
    """Fourth words of the Philox counter that belong to it alone (docs/format.md, section 5)."""
    bits: ClassVar[tuple[int, ...]] = BITS
    """Bits that its coefficients may have."""
    bought: ClassVar[str] = "rank"
    """The option that a budget of bytes is spent on."""
    more_costs_more: ClassVar[bool] = True
    """Whether more of that option takes more bytes."""
    shares_bases: ClassVar[bool] = False
    """Whether drawing the bases takes most of the time, so that targets of one length should be
    expanded together."""

    @property
    @abstractmethod
    def rate(self) -> float:
        """A learning rate of Adam that suits the method."""

    @property
    def variant(self) -> str:
        """Which of the method's GPU kernels the options choose, where there are several."""
        return ""

    @classmethod
    def samples(cls: type[M]) -> tuple[M, ...]:
        """Return small instances, at least one a variant, that a GPU must reproduce first."""
        return (cls(rank=3),)

    @classmethod
    def usual(cls: type[M]) -> M:
        """Return the method with its default options, which every subclass has."""
        return cls()  # type: ignore[call-arg]

    @classmethod
    def of_size(cls: type[M], value: int, sides: Sequence[Shape]) -> M:
        """Make the method with so much of what a budget buys, for targets of these (out, in)."""
        base = cls.usual()
        narrowest = min(map(min, sides))
        return replace(base, **{"rank": min(base.rank, narrowest), cls.bought: value})

    @abstractmethod
    def bound(self, q: Coefficients) -> int:
        """Bound every sum of magnitudes in dQ, from the coefficients alone (format, section 6)."""

    @abstractmethod
    def scales(self) -> tuple[str, ...]:
        """Return the groups whose scales multiply to the update's, with repetition."""

    @abstractmethod
    def scalar(self, q: Mapping[str, Any], shape: Shape, seed: int, index: int = 0) -> Matrix:
        """Compute dQ by scalar loops over the paper's formula, as nested lists (out, in).

        It is what `left` and `right` are checked against, so it shares no arithmetic with them.

        Args:
            q: nested lists of integers by group name, each in its group's shape.
            shape: (out, in).
            seed: of the random bases.
            index: the target's position among the targets.
        """

    def lefts(self, q: Sequence[Coefficients], targets: Sequence[Target], stream: Stream) -> Ints:
        """Compute the left factors of targets with equally many rows, (n, out, K)."""
        rows = range(targets[0].matrix[0])
        return np.stack([self.left(q_, t, stream, rows) for q_, t in zip(q, targets, strict=True)])

    def rights(self, q: Sequence[Coefficients], targets: Sequence[Target], stream: Stream) -> Ints:
        """Compute the right factors of targets with equally many columns, (n, K, in)."""
        return np.stack([self.right(q_, t, stream) for q_, t in zip(q, targets, strict=True)])


def magnitude(q: Ints) -> Ints:
    """Return |q| as int64."""
    return np.abs(q.astype(np.int64))


def peak(q: Ints) -> int:
    """Return the largest |q|, 0 for none."""
    return int(magnitude(q).max(initial=0))
