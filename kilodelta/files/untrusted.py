"""Check the fields of parsed JSON that nobody vouches for, each before it is used.

`kilodelta.files.plain` reads the bytes and `kilodelta.files.canonical` parses them, both within
limits. Every function here takes a value and what messages call it, and returns the value. The
words alone are decided here: the caller turns a `FieldError` into its kind of file's error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from math import isfinite, prod
from typing import Any, TypeVar

T = TypeVar("T")

NAME_BYTES = 255
"""Bytes of the longest file name of the usual file systems: a look at a longer one fails."""
MAX_TEXT = 1024
"""Characters of a text."""

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
    fields, required = mapping(value, where), set(keys)
    if unknown := sorted(set(fields) - required - set(optional)):
        raise FieldError(f"{where} has an unknown key {unknown[0]!r:.80}")
    if missing := sorted(required - set(fields)):
        raise FieldError(f"{where} lacks {missing[0]!r}")
    return fields


def mapping(value: Any, where: str) -> dict[str, Any]:
    """Check an object with any keys.

    Raises:
        FieldError: it is none.
    """
    if not isinstance(value, dict):
        raise FieldError(f"{where} is not an object")
    return value


def listed(value: Any, where: str, item: Callable[[Any, str], T]) -> tuple[T, ...]:
    """Check a list, each element by `item`.

    Raises:
        FieldError: it is no list, or `item` refuses an element.

    Example:
        >>> listed([1, 2], "sizes", whole)
        (1, 2)
    """
    if not isinstance(value, list):
        raise FieldError(f"{where} is not a list")
    return tuple(item(element, f"{where}[{index}]") for index, element in enumerate(value))


def text(value: Any, where: str) -> str:
    """Check a text of at most `MAX_TEXT` characters.

    Raises:
        FieldError: it is none.
    """
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise FieldError(f"{where} is not a text of at most {MAX_TEXT} characters")
    return value


def texts(value: Any, where: str) -> tuple[str, ...]:
    """Check a list of texts.

    Raises:
        FieldError: it is none.
    """
    return listed(value, where, text)


def whole(value: Any, where: str, low: int = 0, high: int = (1 << 63) - 1) -> int:
    """Check a whole number from `low` to `high`.

    Args:
        value: the parsed JSON.
        where: what the message calls it.
        low, high: the smallest and the largest number that is allowed.

    Raises:
        FieldError: it is none, or outside of the range.

    Example:
        >>> whole(7, "keep", 1, 9)
        7
    """
    if type(value) is not int or not low <= value <= high:
        raise FieldError(f"{where} is {short(value)}, not a whole number from {low} to {high}")
    return value


def shape(value: Any, where: str) -> tuple[int, ...]:
    """Check a tensor's shape: fewer than 2^63 elements, in any order of the factors.

    Two sizes of 2^62 are none, although their product with a third of 0 would be.

    Raises:
        FieldError: it is none.

    Example:
        >>> shape([2, 3], "shape")
        (2, 3)
    """
    sizes = listed(value, where, whole)
    if prod(size for size in sizes if size) >= 1 << 63:
        raise FieldError(f"{where} has more elements than can be counted")
    return sizes


def objects(value: Any) -> Iterator[dict[str, Any]]:
    """Yield every object in a JSON value of any depth, itself included."""
    rest = [value]
    while rest:
        part = rest.pop()
        if isinstance(part, dict):
            yield part
            rest += part.values()
        elif isinstance(part, list):
            rest += part


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


def kind(value: Any) -> str:
    """Say in JSON's words what a parsed value is.

    Example:
        >>> kind(None), kind([1]), kind(2.5), kind(True)
        ('null', 'a list', 'a number', 'true')
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    names = {str: "text", list: "a list", dict: "an object", int: "a number", float: "a number"}
    return names[type(value)]


def flag(value: Any, where: str) -> bool:
    """Check true or false.

    Raises:
        FieldError: it is neither.
    """
    if not isinstance(value, bool):
        raise FieldError(f"{where} is {value!r:.40}, not true or false")
    return value


def digest(value: Any, where: str) -> str:
    """Check a SHA-256 as text.

    Raises:
        FieldError: it is none.
    """
    if not isinstance(value, str) or not _DIGEST.match(value):
        raise FieldError(f"{where} is not sha256:<64 hexadecimal digits>")
    return value


def choice(value: Any, where: str, options: Iterable[str]) -> str:
    """Check one of some texts.

    Raises:
        FieldError: it is none of them.
    """
    allowed = tuple(options)
    if not isinstance(value, str) or value not in allowed:
        raise FieldError(f"{where} is {value!r:.40}, not one of {', '.join(allowed)}")
    return value


def file_name(value: Any, where: str) -> str:
    """Check the name of a file in the same folder, never a path out of it.

    Raises:
        FieldError: it is none.
    """
    name = text(value, where)
    if name in {"", ".", ".."} or set(name) & set("/\\:") or not name.isprintable():
        raise FieldError(f"{where} is {name!r:.80}, not a file name")
    if len(name.encode()) > NAME_BYTES:
        raise FieldError(f"{where} is {name!r:.80}..., longer than any file name")
    return name
