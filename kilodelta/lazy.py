"""Export a package's public names without importing what they need, torch above all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy(
    package: str, where: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make a package's `__getattr__` and `__dir__` (PEP 562).

    A name must not be that of a submodule of the package: importing the submodule would put it in
    the name's place.

    Args:
        package: its `__name__`.
        where: each public name, and the module that defines it.

    Example:
        >>> get, names = lazy("shapes", {"pi": "math", "Path": "pathlib"})
        >>> get("pi"), names()
        (3.141592653589793, ['Path', 'pi'])
        >>> get("tau")
        Traceback (most recent call last):
        AttributeError: module 'shapes' has no attribute 'tau'
    """

    def get(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(where[name]), name)

    return get, lambda: sorted(where)
