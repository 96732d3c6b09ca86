"""What a method is: five functions and its options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from kilodelta.exact.bases import Stream
from kilodelta.format.coefficients import Group
from kilodelta.format.targets import Target

Ints = npt.NDArray[Any]
Coefficients = Mapping[str, Ints]
"""A target's integer coefficients by group name, the file's shared groups among them."""


class Method(Protocol):
    """One way from coefficients to an integer update dQ = left @ right of shape (out, in)."""

    name: ClassVar[str]
    paper: ClassVar[str]

    @property
    def rank(self) -> int:
        """r in the paper."""

    def shared(self) -> tuple[Group, ...]:
        """Groups that the whole file has once."""

    def groups(self, target: Target) -> tuple[Group, ...]:
        """Groups of one target, in file order."""

    def left(self, q: Coefficients, target: Target, stream: Stream, rows: range) -> Ints:
        """Rows of the left factor, integers (rows, K)."""

    def right(self, q: Coefficients, target: Target, stream: Stream) -> Ints:
        """The right factor, integers (K, in)."""

    def bound(self, q: Coefficients) -> int:
        """An upper bound of every sum of magnitudes in dQ, from the coefficients alone."""

    def scales(self) -> tuple[str, ...]:
        """The groups whose scales multiply to the update's, with repetition."""


def magnitude(q: Ints) -> Ints:
    """|q| as int64."""
    return np.abs(q.astype(np.int64))


def peak(q: Ints) -> int:
    """max |q|, 0 for none."""
    return int(magnitude(q).max(initial=0))
