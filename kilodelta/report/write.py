"""Write a result as an HTML page and as JSON beside it."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kilodelta.errors import InputError, OutputError, require
from kilodelta.report.pages import PAGES
from kilodelta.report.pages.parts import Json

USUAL = 200_000
"""Bytes that a disk is asked for before the work: a page with its pictures and its JSON."""


def write_report(path: str | os.PathLike[str], kind: str, result: Json) -> Path:
    """Write a result as an HTML page, and as JSON beside it.

    Args:
        path: the page; its JSON takes the same name with the suffix `.json`.
        kind: the command that made the result: `compress`, `verify`, `export`, `demo` or `fleet`.
        result: what that command prints with `--json`. `commands` in it, a list of shell lines,
            are shown as the way to make it again; by default the command that is running.

    Returns:
        The path of the JSON.

    Raises:
        InputError: the path does not end in `.html`, or there is no page for this kind.
        MissingPackageError: matplotlib is not installed.
        OutputError: the files cannot be written.
    """
    from kilodelta.files import staging

    place = Path(path)
    require_page(place)
    if kind not in PAGES:
        raise InputError(f"there is no report of {kind!r}", fix=f"one of {', '.join(PAGES)}")
    result = _strict({"commands": running_command(), **result})
    text = PAGES[kind](result).html()
    data = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # Half a surrogate pair, which JSON may spell, is no character: it is shown as it was spelt.
    staging.write(place, text.encode("utf-8", "backslashreplace"))
    staging.write(place.with_suffix(".json"), data.encode("utf-8", "backslashreplace"))
    return place.with_suffix(".json")


def require_page(path: Path) -> None:
    """See that a page can be written, before the work whose result it shows.

    Raises:
        InputError: the name does not end in `.html`.
        OutputError: its folder is missing or cannot be written to, or its disk is full.
        MissingPackageError: matplotlib is not installed.
    """
    from kilodelta.files import staging

    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{path} is no HTML file", fix="give a name that ends in .html")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path} lies in no folder", fix="make the folder first")
    staging.require_room(
        staging.Need(path=path, nbytes=USUAL, what="the report"),
        fix="give --report a place on a larger disk that you may write to",
    )
    require("matplotlib", extra="report", why="draw the report's pictures")


def running_command() -> list[str]:
    """Return the command line that is running, if it is kilodelta's own."""
    program = Path(sys.argv[0] if sys.argv else "")
    if program.name != "kilodelta" and program.parts[-2:] != ("kilodelta", "__main__.py"):
        return []
    return [shlex.join(["kilodelta", *sys.argv[1:]])]


def _strict(value: Any) -> Any:
    """Turn numbers that strict JSON lacks into texts, tuples into lists, paths into texts."""
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value
