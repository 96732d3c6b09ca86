"""Open the models that compress, export and verify work on: weights, inputs and outputs.

A model is a Hugging Face folder, `hf:org/name` or a function of the user's own; inputs are texts,
arrays or batches. Opening one needs torch, and Hugging Face folders need transformers
(`pip install '.[hf]'`), so names load when first used; `layer_names` needs neither.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kilodelta.models.heads import Pooling as Pooling
    from kilodelta.models.heads import View as View
    from kilodelta.models.heads import counted as counted
    from kilodelta.models.hub import locate as locate
    from kilodelta.models.hub import locate_delta as locate_delta
    from kilodelta.models.hub import locate_either as locate_either
    from kilodelta.models.inputs.examples import example as example
    from kilodelta.models.inputs.read import Batch as Batch
    from kilodelta.models.inputs.read import read_inputs as read_inputs
    from kilodelta.models.inputs.read import tokenize as tokenize
    from kilodelta.models.inputs.sources import check_spec as check_spec
    from kilodelta.models.inputs.sources import open_source as open_source
    from kilodelta.models.inputs.texts import read_texts as read_texts
    from kilodelta.models.load import open_model as open_model
    from kilodelta.models.loaded import LoadedModel as LoadedModel
    from kilodelta.models.loaded import outputs as outputs
    from kilodelta.models.weights import fill as fill

_WHERE = {
    "Batch": "kilodelta.models.inputs.read",
    "LoadedModel": "kilodelta.models.loaded",
    "Pooling": "kilodelta.models.heads",
    "View": "kilodelta.models.heads",
    "check_spec": "kilodelta.models.inputs.sources",
    "counted": "kilodelta.models.heads",
    "example": "kilodelta.models.inputs.examples",
    "fill": "kilodelta.models.weights",
    "locate": "kilodelta.models.hub",
    "locate_delta": "kilodelta.models.hub",
    "locate_either": "kilodelta.models.hub",
    "open_model": "kilodelta.models.load",
    "open_source": "kilodelta.models.inputs.sources",
    "outputs": "kilodelta.models.loaded",
    "read_inputs": "kilodelta.models.inputs.read",
    "read_texts": "kilodelta.models.inputs.texts",
    "tokenize": "kilodelta.models.inputs.read",
}

__all__ = [
    "Batch",
    "LoadedModel",
    "Pooling",
    "View",
    "check_spec",
    "counted",
    "example",
    "fill",
    "locate",
    "locate_delta",
    "locate_either",
    "open_model",
    "open_source",
    "outputs",
    "read_inputs",
    "read_texts",
    "tokenize",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
