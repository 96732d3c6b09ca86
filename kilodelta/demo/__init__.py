"""Show all of kilodelta on a real model, offline: a task, a teacher, and every step after them.

`task` makes a task of docstrings, `teacher` fine-tunes a model for it, `run` does the rest by the
library's own functions. `demo` is the command of that name; it needs the extra `demo`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kilodelta.demo.run import Demo as Demo
    from kilodelta.demo.run import demo as demo

__all__ = ["Demo", "demo"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("kilodelta.demo.run"), name)


def __dir__() -> list[str]:
    return list(__all__)
