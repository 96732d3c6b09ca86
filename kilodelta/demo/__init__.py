"""Show all of kilodelta on a real model, offline: a task, a teacher, and every step after them.

`task` makes a task of docstrings, `teacher` fine-tunes a model for it, `run` does the rest by the
library's own functions. `demo` is the command of that name; it needs the extra `demo`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kilodelta.lazy import lazy

if TYPE_CHECKING:
    from kilodelta.demo.run import Demo as Demo
    from kilodelta.demo.run import demo as demo

__all__ = ["Demo", "demo"]

__getattr__, __dir__ = lazy(__name__, dict.fromkeys(__all__, "kilodelta.demo.run"))
