"""What a compatibility form is: a float32 product whose basis is another tool's."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from kilodelta.errors import SelfTestError
from kilodelta.files.untrusted import digest, number
from kilodelta.format.fields import Check, one_of
from kilodelta.format.foreign.stored import DTYPES
from kilodelta.format.form import Form
from kilodelta.format.targets import Target

Floats = npt.NDArray[Any]
Values = Mapping[str, Floats]
"""A target's coefficients by group name, the file's shared groups among them."""

ALPHA: Check = number
DTYPE: Check = one_of(*DTYPES)
FINGERPRINT: Check = digest


@dataclass(frozen=True, kw_only=True)
class Compat(Form):
    """One way from float coefficients to an update scaling * left @ right of shape (out, in).

    Both factors are float32 and come from elementwise operations alone, so that every machine
    computes the same; `kilodelta.exact.ordered` multiplies them in one fixed order.
    """

    @property
    @abstractmethod
    def scaling(self) -> float:
        """What the product is multiplied by, alpha / r."""

    def problem(self, layout: tuple[Target, ...]) -> str:
        """Say what does not fit between the options and the base's targets; empty if nothing."""
        return ""


def require_print(expected: str, drawn: str, what: str) -> None:
    """Check that a basis drawn here is the one that the file was made with.

    Args:
        expected: the fingerprint that the file states.
        drawn: the fingerprint of the basis drawn here.
        what: what the message calls the basis.

    Raises:
        SelfTestError: it is another one.
    """
    if drawn != expected:
        raise SelfTestError(
            f"{what} comes out here with SHA-256 {drawn}, the file says {expected}",
            fix="use another version of numpy or another machine, and report this one",
        )
