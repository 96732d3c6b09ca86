"""Make a delta: distil a fine-tuned model, train one in your own loop, or import an adapter.

`distill/` compresses a tuned model and is `compress` here, `training/` is `kilodelta.train`, and
`adapters/` reads what PEFT and the official NOLA code trained and is `import_adapter` here. Names
load when they are first used; all but `Options` need torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kilodelta.lazy import lazy

if TYPE_CHECKING:
    from kilodelta.compress.adapters.conversion import Imported as Imported
    from kilodelta.compress.adapters.importing import import_adapter as import_adapter
    from kilodelta.compress.distill.compress import compress as compress
    from kilodelta.compress.distill.options import Options as Options
    from kilodelta.compress.distill.planning.plan import Planned as Planned
    from kilodelta.compress.distill.planning.plan import plan as plan
    from kilodelta.compress.distill.report import Report as Report
    from kilodelta.compress.training import train as train

_WHERE = {
    "Imported": "kilodelta.compress.adapters.conversion",
    "Options": "kilodelta.compress.distill.options",
    "Report": "kilodelta.compress.distill.report",
    "Planned": "kilodelta.compress.distill.planning.plan",
    "compress": "kilodelta.compress.distill.compress",
    "import_adapter": "kilodelta.compress.adapters.importing",
    "plan": "kilodelta.compress.distill.planning.plan",
}

__all__ = [
    "Imported",
    "Options",
    "Planned",
    "Report",
    "compress",
    "import_adapter",
    "plan",
    "train",
]


_attribute, _names = lazy(__name__, _WHERE)


def __getattr__(name: str) -> Any:
    if name == "train":  # the module itself is public
        return import_module("kilodelta.compress.training.train")
    return _attribute(name)


def __dir__() -> list[str]:
    return [*_names(), "train"]
