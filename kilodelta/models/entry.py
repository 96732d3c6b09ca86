"""Functions that a user names as `package.module:function`."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kilodelta.errors import InputError

_PATTERN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_entry(spec: str) -> bool:
    """Whether a text has the form `package.module:function`."""
    return _PATTERN.fullmatch(spec) is not None


def call_entry(spec: str) -> Any:
    """Import the module, from the working directory too, and call the function without arguments.

    Raises:
        InputError: there is no such module or function. What the function raises passes through.
    """
    with _working_directory():
        return _resolve(spec)()


def _resolve(spec: str) -> Callable[[], Any]:
    place, _, name = spec.partition(":")
    try:
        module = importlib.import_module(place)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{spec}: there is no module {error.name}",
            fix="run where the module lies, install it, or correct its name",
        ) from None
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(
            f"{spec}: {place} has no function {name}", fix="give package.module:function"
        )
    found: Callable[[], Any] = function
    return found


@contextmanager
def _working_directory() -> Iterator[None]:
    """Let imports find what lies in the working directory, after everything installed."""
    here = str(Path.cwd())
    if here in sys.path:
        yield
        return
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)
