"""kilodelta: a fine-tuned model as base digest + seed + integer coefficients.

Everything here is loaded when it is first used; importing kilodelta imports nothing else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kilodelta.export.merge.checkpoint import merge as merge
    from kilodelta.files.checkpoint import Checkpoint as Checkpoint
    from kilodelta.files.identity import digest as digest
    from kilodelta.format.delta import Delta as Delta
    from kilodelta.format.file import load as load
    from kilodelta.format.inspect import inspect as inspect

__version__ = "0.1.0"

_WHERE = {
    "Checkpoint": "kilodelta.files.checkpoint",
    "Delta": "kilodelta.format.delta",
    "digest": "kilodelta.files.identity",
    "inspect": "kilodelta.format.inspect",
    "load": "kilodelta.format.file",
    "merge": "kilodelta.export.merge.checkpoint",
}

__all__ = ["Checkpoint", "Delta", "digest", "inspect", "load", "merge"]


def __getattr__(name: str) -> Any:
    if name == "train":
        from kilodelta.errors import require

        require("torch", extra="torch", why="train a delta")
        return importlib.import_module("kilodelta.compress.training.train")
    if name not in _WHERE:
        raise AttributeError(f"module 'kilodelta' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE, "train"])
