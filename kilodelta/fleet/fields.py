"""Check one field of `fleet.toml` at a time, naming it in the error."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kilodelta.files.untrusted import FieldError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")
"""What a base, fine-tune or target may be called: names become folders of results."""


_KINDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list of texts",
    dict: "a table",
}


def named_tables(table: dict[str, Any], key: str) -> dict[str, dict[str, Any]]:
    """Return the tables `[key.NAME]` by their names.

    Raises:
        FieldError: one is no table, or its name is not allowed.
    """
    tables = table.get(key, {})
    if not isinstance(tables, dict):
        raise FieldError(f"{key} is not a table [{key}.NAME]")
    for name, value in tables.items():
        if not NAME.match(name):
            raise FieldError(f"{key}.{name!r:.80} is no name of letters, digits, '.', '_', '-'")
        if not isinstance(value, dict):
            raise FieldError(f"{key}.{name} is not a table")
    return tables


def refuse_unknown(table: Mapping[str, Any], where: str, keys: Iterable[str]) -> None:
    """Refuse fields that are not among `keys`.

    Raises:
        FieldError: one is unknown.
    """
    for key in table:
        if key not in keys:
            raise FieldError(f"{where + '.' if where else ''}{key!s:.80} is no field known here")


def typed(table: Mapping[str, Any], where: str, key: str, kind: type, default: Any) -> Any:
    """Take a value of a type; whole numbers count as numbers, true and false do not.

    Args:
        table: the table that holds the value.
        where: the table's own name, for the error.
        key: the field's name.
        kind: the type; a `list` is one of texts.
        default: returned where the field is missing.

    Raises:
        FieldError: the value is of another type.
    """
    if key not in table:
        return default
    value = table[key]
    fits = isinstance(value, kind) or (kind is float and type(value) is int)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise FieldError(f"{where}.{key} is {value!r:.60}, not {_KINDS[kind]}")
    if kind is list and not all(isinstance(item, str) for item in value):
        raise FieldError(f"{where}.{key} is not a list of texts")
    return value


def typed_fields(table: Mapping[str, Any], where: str, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table whose fields have the types that `kinds` gives by name.

    Raises:
        FieldError: a field is unknown or of another type.
    """
    refuse_unknown(table, where, kinds)
    return {key: typed(table, where, key, kinds[key], None) for key in table}


def present(path: Path, where: str) -> Path:
    """Return a path that exists.

    Raises:
        FieldError: nothing is there.
    """
    if not path.exists():
        raise FieldError(f"{where}: {path} is missing")
    return path


def globbed(root: Path, where: str, patterns: list[str]) -> list[Path]:
    """Return the paths of all patterns in name order.

    Raises:
        FieldError: there are no patterns, or one matches nothing.
    """
    if not patterns:
        raise FieldError(f"{where} is an empty list")
    out: dict[Path, None] = {}
    for pattern in patterns:
        hits = sorted(glob.glob(str(root / pattern)))
        if not hits:
            raise FieldError(f"{where}: {pattern!r:.200} matches nothing in {root.resolve()}")
        out |= dict.fromkeys(map(Path, hits))
    return sorted(out)
