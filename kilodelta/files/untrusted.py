"""Reading JSON that nobody vouches for: every value is looked at before it is used."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from math import isfinite
from typing import Any, TypeVar

T = TypeVar("T")

MAX_TEXT = 1024
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")


class FieldError(ValueError):
    """A field is not what it must be; the message names it."""


def table(
    value: Any, where: str, keys: Iterable[str], optional: Iterable[str] = ()
) -> dict[str, Any]:
    """Check an object that has exactly these keys, and may have the optional ones.

    Args:
        value: the parsed JSON.
        where: what the message calls it.
        keys: the keys that it must have.
        optional: further keys that it may have.

    Raises:
        FieldError: it is no object, lacks a key, or has another one.
    """
    found = mapping(value, where)
    wanted = set(keys)
    if unknown := sorted(set(found) - wanted - set(optional)):
        raise FieldError(f"{where} has an unknown key {unknown[0]!r:.80}")
    if missing := sorted(wanted - set(found)):
        raise FieldError(f"{where} lacks {missing[0]!r}")
    return found


def mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FieldError(f"{where} is not an object")
    return value


def listed(value: Any, where: str, item: Callable[[Any, str], T]) -> tuple[T, ...]:
    """A list, each element read by `item`."""
    if not isinstance(value, list):
        raise FieldError(f"{where} is not a list")
    return tuple(item(element, f"{where}[{index}]") for index, element in enumerate(value))


def text(value: Any, where: str) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise FieldError(f"{where} is not a text of at most {MAX_TEXT} characters")
    return value


def texts(value: Any, where: str) -> tuple[str, ...]:
    return listed(value, where, text)


def whole(value: Any, where: str, low: int = 0, high: int = (1 << 63) - 1) -> int:
    """Check a whole number from `low` to `high`.

    Args:
        value: the parsed JSON.
        where: what the message calls it.
        low, high: the smallest and the largest number that is allowed.

    Raises:
        FieldError: it is none, or outside of the range.
    """
    if type(value) is not int or not low <= value <= high:
        shown = short(value)
        raise FieldError(f"{where} is {shown}, not a whole number from {low} to {high}")
    return value


def number(value: Any, where: str) -> float:
    """Check a finite number, whole or not, of at most 2^64 in magnitude.

    Raises:
        FieldError: it is none.
    """
    # The magnitude comes first: a whole number beyond float64 has no `isfinite`.
    if type(value) not in (int, float) or not abs(value) <= 2**64 or not isfinite(value):
        raise FieldError(f"{where} is {short(value)}, not a finite number of usual size")
    return float(value)


def short(value: Any) -> str:
    """Show a value in at most 40 characters; a huge integer by its length alone.

    Python refuses to print integers of more than a few thousand digits.
    """
    if type(value) is int and abs(value) >= 1 << 128:
        return f"a number of {value.bit_length()} bits"
    return f"{value!r:.40}"


def flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise FieldError(f"{where} is {value!r:.40}, not true or false")
    return value


def digest(value: Any, where: str) -> str:
    if not isinstance(value, str) or not _DIGEST.match(value):
        raise FieldError(f"{where} is not sha256:<64 hexadecimal digits>")
    return value


def choice(value: Any, where: str, options: Iterable[str]) -> str:
    known = tuple(options)
    if not isinstance(value, str) or value not in known:
        raise FieldError(f"{where} is {value!r:.40}, not one of {', '.join(known)}")
    return value


def file_name(value: Any, where: str) -> str:
    """A name in the manifest's own folder: never a path out of it."""
    name = text(value, where)
    if name in {"", ".", ".."} or set(name) & set("/\\:") or not name.isprintable():
        raise FieldError(f"{where} is {name!r:.80}, not a file name")
    return name
