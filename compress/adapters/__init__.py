"""Import other tools' adapters: Hugging Face PEFT and the official NOLA code.

`import_adapter` turns an adapter and its base into a proved `.kd` file. `peft/` and
`official_nola/` read one tool's files each and return a `ParsedAdapter`; `architecture.py` and
`placing.py` tell which of the base's tensors an adapter speaks of; `low_rank.py` and
`requantise.py` make exact deltas of float updates.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kilodelta.compress.adapters.conversion import Imported as Imported
    from kilodelta.compress.adapters.importing import import_adapter as import_adapter

_WHERE = {"Imported": "conversion", "import_adapter": "importing"}

__all__ = ["Imported", "import_adapter"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
