"""Import other tools' adapters: Hugging Face PEFT and the official NOLA code.

`import_adapter` turns an adapter and its base into a proved `.kd` file. `peft/` and
`official_nola/` read one tool's files each and return a `ParsedAdapter`; `architecture.py` and
`placing.py` tell which of the base's tensors an adapter speaks of; `low_rank.py` and
`requantise.py` make exact deltas of float updates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kilodelta.lazy import lazy

if TYPE_CHECKING:
    from kilodelta.compress.adapters.conversion import Imported as Imported
    from kilodelta.compress.adapters.importing import import_adapter as import_adapter

_WHERE = {
    "Imported": "kilodelta.compress.adapters.conversion",
    "import_adapter": "kilodelta.compress.adapters.importing",
}

__all__ = ["Imported", "import_adapter"]

__getattr__, __dir__ = lazy(__name__, _WHERE)
