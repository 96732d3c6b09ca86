"""Read the manifest's field `method`, the name of an exact method or a form, and write it in words.

docs/format.md, sections 3 and 9.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kilodelta.files.untrusted import FieldError, table
from kilodelta.format.foreign import COMPAT
from kilodelta.format.form import Form
from kilodelta.format.methods import METHODS


def parse_method(value: Any) -> Form:
    """Make the method that a manifest names, each option checked.

    Raises:
        FieldError: naming the option that breaks a rule.

    Example:
        >>> parse_method({"name": "lora", "rank": 2})
        Lora(rank=2)
    """
    name = value.get("name") if isinstance(value, dict) else value
    kind: Any = None
    if isinstance(value, dict) and isinstance(name, str):  # a list is no key of a mapping
        kind = METHODS.get(name) or COMPAT.get(name)
    if kind is None:
        names = ", ".join((*METHODS, *COMPAT))
        raise FieldError(f"method {name!r:.80} is unknown; known are {names}")
    options = dict(table(value, "method", {"name", *kind.option_names(value)}))
    del options["name"]
    for option, given in options.items():
        kind.checks[option](given, f"method.{option}")
    method: Form = kind(**options)
    return method


def options_in_words(method: Mapping[str, Any]) -> str:
    """Write a method's options in one line, for people.

    Args:
        method: the field, as a file or a report holds it.

    Example:
        >>> options_in_words({"name": "nola", "rank": 2, "bases": 9})
        'rank 2, bases 9'
    """
    return ", ".join(f"{key} {value}" for key, value in method.items() if key != "name")
