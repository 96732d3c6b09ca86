"""Checks of single values that come from a file and are not trusted."""

from __future__ import annotations

import base64
import binascii
import re
from math import isfinite
from typing import Any

from kilodelta.errors import FileError

MAX_TEXT = 1024

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")


def fault(what: str) -> FileError:
    """The error of a manifest that breaks a rule."""
    return FileError(
        f"the manifest is wrong: {what}",
        fix="the file is damaged or not written by kilodelta: fetch it again",
    )


def keys(value: Any, where: str, names: set[str], optional: set[str] | None = None) -> Any:
    """An object with exactly these keys."""
    if not isinstance(value, dict):
        raise fault(f"{where} is not an object")
    if unknown := sorted(set(value) - names - (optional or set())):
        raise fault(f"{where} has an unknown key {unknown[0]!r:.80}")
    if missing := sorted(names - set(value)):
        raise fault(f"{where} lacks {missing[0]!r}")
    return value


def text(value: Any, where: str) -> str:
    """A text of bounded length."""
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise fault(f"{where} is not a text of at most {MAX_TEXT} characters")
    return value


def choice(value: Any, where: str, allowed: tuple[str, ...]) -> str:
    """One of some texts."""
    if value not in allowed or not isinstance(value, str):
        raise fault(f"{where} is {value!r:.40}, not one of {allowed}")
    return value


def whole(value: Any, where: str, low: int, high: int) -> int:
    """An integer in a range."""
    if type(value) is not int or not low <= value <= high:
        raise fault(f"{where} is {value!r:.40}, not a whole number from {low} to {high}")
    return value


def number(value: Any, where: str) -> float:
    """A finite number, an integer or not."""
    if type(value) not in (int, float) or not isfinite(value) or abs(value) > 2.0**64:
        raise fault(f"{where} is {value!r:.40}, not a finite number of usual size")
    return float(value)


def digest(value: Any, where: str) -> str:
    """A SHA-256 by its text."""
    if not isinstance(value, str) or not _DIGEST.match(value):
        raise fault(f"{where} is not sha256:<64 hexadecimal digits>")
    return value


def to_base64(data: bytes) -> str:
    """Bytes as the manifest writes them."""
    return base64.b64encode(data).decode("ascii")


def from_base64(value: Any, where: str) -> bytes:
    """The inverse; one spelling only."""
    try:
        data = base64.b64decode(value, validate=True) if isinstance(value, str) else None
    except (binascii.Error, ValueError):
        data = None
    if data is None or to_base64(data) != value:
        raise fault(f"{where} is not base64")
    return data
