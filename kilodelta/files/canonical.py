"""JSON with one spelling only: sorted keys, no spaces, UTF-8; and a parser that trusts nothing."""

from __future__ import annotations

import json
from typing import Any, NoReturn


class NotCanonicalError(ValueError):
    """The text is not JSON, or breaks a rule that this project's JSON obeys."""


def dumps(value: Any) -> str:
    """The one canonical text of a value (RFC 8785's spirit: sorted keys, no spaces)."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise NotCanonicalError("a key stands twice in one object")
    return found


def _constant(text: str) -> NoReturn:
    raise NotCanonicalError(f"{text} is not JSON")


def loads(text: bytes) -> Any:
    """Parse UTF-8 JSON.

    Raises:
        NotCanonicalError: not UTF-8, not JSON, a repeated key, NaN or infinity, nested too
            deeply, or a lone surrogate in a string.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_pairs, parse_constant=_constant)
        dumps(value).encode("utf-8")
    except NotCanonicalError:
        raise
    except RecursionError:
        raise NotCanonicalError("it is nested too deeply") from None
    except ValueError as error:
        raise NotCanonicalError(str(error)) from None
    return value
