"""Parse JSON that nobody vouches for, and write JSON in one spelling only.

The spelling has sorted keys, no spaces and is UTF-8, in the spirit of RFC 8785.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

MAX_DEPTH = 64
"""Objects and lists inside each other."""
MAX_DIGITS = 300
"""Digits of a whole number, so that every one fits into float64 and can be printed."""


class NotCanonicalError(ValueError):
    """The text is not JSON, or breaks a rule that this project's JSON obeys."""


def dumps(value: Any) -> str:
    """Write a value in its one canonical spelling.

    Example:
        >>> dumps({"b": [1, 2.5], "a": "é"})
        '{"a":"é","b":[1,2.5]}'
    """
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def loads(text: bytes) -> Any:
    """Parse UTF-8 JSON in any spelling.

    Raises:
        NotCanonicalError: not UTF-8, not JSON, a repeated key, NaN or infinity, nested more than
            `MAX_DEPTH` deep, a whole number of more than `MAX_DIGITS` digits, or a lone surrogate
            in a string.
    """
    value = _parsed(text, object_pairs_hook=_pairs, parse_constant=_constant)
    try:
        dumps(value).encode("utf-8")
    except ValueError as error:
        raise NotCanonicalError(str(error)) from None
    return value


def loads_foreign(text: bytes) -> Any:
    """Parse JSON as other tools write it: of repeated keys the last counts, NaN and infinity are
    numbers, and a byte order mark is skipped.

    Raises:
        NotCanonicalError: not UTF-8, not JSON, nested too deeply, or with too long a number.
    """
    return _parsed(text.removeprefix(b"\xef\xbb\xbf"))


def _parsed(text: bytes, **hooks: Any) -> Any:
    try:
        value = json.loads(text.decode("utf-8"), parse_int=_whole, **hooks)
    except NotCanonicalError:
        raise
    except RecursionError:
        raise NotCanonicalError("it is nested too deeply") from None
    except ValueError as error:
        raise NotCanonicalError(str(error)) from None
    _check_depth(value)
    return value


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise NotCanonicalError("a key stands twice in one object")
    return table


def _constant(text: str) -> NoReturn:
    raise NotCanonicalError(f"{text} is not JSON")


def _whole(text: str) -> int | float:
    if len(text) > MAX_DIGITS:
        raise NotCanonicalError(f"a number has {len(text)} digits")
    return -0.0 if text == "-0" else int(text)  # as other parsers read it


def _check_depth(value: Any) -> None:
    """Walk level by level: a value that is too deep for the stack never meets recursive code."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for parent in level
            if isinstance(parent, (dict, list))
            for item in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return
    raise NotCanonicalError("it is nested too deeply")
