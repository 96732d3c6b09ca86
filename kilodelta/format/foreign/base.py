"""What a compatibility form is: a float32 product whose basis is another tool's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import numpy.typing as npt

from kilodelta.errors import SelfTestError
from kilodelta.exact.bases import Stream
from kilodelta.format.coefficients import Group
from kilodelta.format.targets import Target

Floats = npt.NDArray[Any]
Values = Mapping[str, Floats]
"""A target's coefficients by group name, the file's shared groups among them."""


class Compat(Protocol):
    """One way from float coefficients to an update scaling * left @ right of shape (out, in).

    Both factors are float32 and come from elementwise operations alone, so that every machine
    computes the same; `kilodelta.exact.ordered` multiplies them in one fixed order.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    choices: ClassVar[Mapping[str, tuple[str, ...]]]
    """The texts that an option may be."""

    @property
    def rank(self) -> int:
        """r of the other tool."""

    @property
    def scaling(self) -> float:
        """What the product is multiplied by, alpha / r."""

    def shared(self) -> tuple[Group, ...]:
        """Groups that the whole file has once."""

    def groups(self, target: Target) -> tuple[Group, ...]:
        """Groups of one target, in file order."""

    def problem(self, layout: tuple[Target, ...]) -> str:
        """What does not fit between the options and the base's targets; empty if nothing."""

    def left(self, q: Values, target: Target, stream: Stream, rows: range) -> Floats:
        """Rows of the left factor, float32 (rows, K)."""

    def right(self, q: Values, target: Target, stream: Stream) -> Floats:
        """The right factor, float32 (K, in)."""


def require_print(expected: str, found: str, what: str) -> None:
    """The basis drawn here must be the one that the file was made with.

    Raises:
        SelfTestError: it is another one.
    """
    if found != expected:
        raise SelfTestError(
            f"{what} comes out here with SHA-256 {found}, the file says {expected}",
            fix="use another version of numpy or another machine, and report this one",
        )
