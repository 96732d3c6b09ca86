"""Make a delta: distil a fine-tune, train in a loop of one's own, or import an adapter.

`distill/` compresses a tuned model, `training/` is `kilodelta.train`, `adapters/` reads what PEFT
and the official NOLA code trained. Names load when first used; all of them need torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kilodelta.compress.distill.compress import compress as compress
    from kilodelta.compress.distill.options import Options as Options
    from kilodelta.compress.training import train as train

_WHERE = {
    "Options": "kilodelta.compress.distill.options",
    "compress": "kilodelta.compress.distill.compress",
}

__all__ = ["Options", "compress", "train"]


def __getattr__(name: str) -> Any:
    if name == "train":
        return importlib.import_module("kilodelta.compress.training.train")
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
