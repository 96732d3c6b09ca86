"""Functions that a user names as `package.module:function`."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kilodelta.errors import InputError, KiloDeltaError

_PATTERN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_entry(spec: str) -> bool:
    """Tell whether a text has the form `package.module:function`.

    Example:
        >>> is_entry("my.models:make"), is_entry("texts.txt")
        (True, False)
    """
    return _PATTERN.fullmatch(spec) is not None


def find_entry(spec: str) -> Callable[[], Any]:
    """Import the module, also from the working directory, and return the function.

    Args:
        spec: `package.module:function`.

    Raises:
        InputError: there is no such module or function, or the module cannot be imported.
    """
    place, _, name = spec.partition(":")
    with _working_directory(), _explained(spec):
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise InputError(
                f"{spec}: there is no module {error.name}",
                fix="run where the module lies, install it, or correct its name",
            ) from None
    function: Any = getattr(module, name, None)
    if not callable(function):
        raise InputError(
            f"{spec}: {place} has no function {name}", fix="give package.module:function"
        )
    found: Callable[[], Any] = function
    return found


def call_entry(spec: str) -> Any:
    """Import the module, also from the working directory, and call the function without arguments.

    Args:
        spec: `package.module:function`.

    Raises:
        InputError: there is no such module or function, or it fails.

    Example:
        >>> call_entry("os:getpid") == __import__("os").getpid()
        True
    """
    function = find_entry(spec)
    with _working_directory(), _explained(spec):
        return function()


@contextmanager
def _explained(spec: str) -> Iterator[None]:
    """Turn what the user's own code raises into a sentence; the cause stays chained to it."""
    place, _, name = spec.partition(":")
    try:
        yield
    except KiloDeltaError:
        raise
    except Exception as error:
        raise InputError(
            f"{spec} fails with {type(error).__name__}: {error}",
            fix=f'see where by python -c "import {place}; {place}.{name}()"',
        ) from error


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
