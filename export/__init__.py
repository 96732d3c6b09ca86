"""Use a delta: merge it, export it to ONNX and TensorRT, patch, refit, adapt, or hand it to PEFT.

One folder for each target; `pipeline.py` writes several at once with a manifest of their digests.
Names load when first used: merging and patching need neither torch nor onnx.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kilodelta.export.adapter.folder import AdapterOptions as AdapterOptions
    from kilodelta.export.adapter.folder import export_adapter as export_adapter
    from kilodelta.export.options import Options as Options
    from kilodelta.export.peft.adapter import PeftOptions as PeftOptions
    from kilodelta.export.peft.adapter import export_peft as export_peft
    from kilodelta.export.pipeline import export as export

_WHERE = {
    "AdapterOptions": "kilodelta.export.adapter.folder",
    "Options": "kilodelta.export.options",
    "PeftOptions": "kilodelta.export.peft.adapter",
    "export": "kilodelta.export.pipeline",
    "export_adapter": "kilodelta.export.adapter.folder",
    "export_peft": "kilodelta.export.peft.adapter",
}

__all__ = [
    "AdapterOptions",
    "Options",
    "PeftOptions",
    "export",
    "export_adapter",
    "export_peft",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
