"""Check the fields of a manifest, which come from a file and are not trusted.

docs/format.md, section 3. The checks raise `FieldError`, which says what is wrong with which field;
`kilodelta.format.manifest.parse` makes a `FileError` of it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from functools import partial
from typing import Any

from kilodelta.files.untrusted import FieldError, choice, whole

Check = Callable[[Any, str], object]
"""Looks at a value and the name of its field; raises `FieldError` where a rule is broken."""

MAX_RANK = 4096
MAX_BASES = 1 << 24
"""Random matrices that a factor may be summed from, or numbers of a shared vector."""

MAX_SIDE = 1 << 24
"""Longest side of a stored basis."""


def whole_in(low: int, high: int) -> Check:
    """Make the check of a whole number in a range."""
    return partial(whole, low=low, high=high)


def one_of(*options: str) -> Check:
    """Make the check of a text that must be one of some."""
    return partial(choice, options=options)


RANK: Check = whole_in(1, MAX_RANK)
BASES: Check = whole_in(1, MAX_BASES)
SIDE: Check = whole_in(1, MAX_SIDE)


def to_base64(data: bytes) -> str:
    """Write bytes as the manifest writes them."""
    return base64.b64encode(data).decode("ascii")


def from_base64(value: Any, where: str) -> bytes:
    """Read what `to_base64` wrote; no other spelling of the same bytes is accepted.

    Raises:
        FieldError: it is not that.
    """
    try:
        data = base64.b64decode(value, validate=True) if isinstance(value, str) else None
    except (binascii.Error, ValueError):
        data = None
    if data is None or to_base64(data) != value:
        raise FieldError(f"{where} is not base64")
    return data
