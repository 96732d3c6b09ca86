"""Ask transformers what it calls the modules of a base once it is loaded, and what they are.

transformers renames tensors while loading: a ViT's files say `encoder.layer.0.attention.attention
.query`, its version 5 `layers.0.attention.q_proj`. PEFT passes over names that it does not find.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kilodelta.errors import require
from kilodelta.export.peft.modules import ModuleKind, ModuleNaming, StackedParameter, refused
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.tying import tied
from kilodelta.format.targets import Target
from kilodelta.models.layer_names import owner

_KINDS: Mapping[str, ModuleKind] = {
    "Linear": ModuleKind.LINEAR,
    "Conv1D": ModuleKind.CONV1D,
    "Embedding": ModuleKind.EMBEDDING,
}


@dataclass(frozen=True, kw_only=True)
class LoadedNaming(ModuleNaming):
    """Names and kinds as a loaded model has them."""

    names: Mapping[str, str]
    """The base's tensor to the model's."""
    layers: Mapping[str, str]
    """Module path to its class, the nearest that torch or transformers defines."""
    shared: frozenset[str]
    """The base's tensors that more than one module of the model holds."""
    stacks: Mapping[str, StackedParameter]
    """The base's tensors that are bare parameters with the matrices of several experts."""

    def path(self, name: str) -> str:
        return owner(self.names.get(name, name))

    def matrix_kind(self, target: Target) -> ModuleKind:
        layer = self.layers.get(self.path(target.name), "none")
        if layer not in _KINDS:
            raise refused(target.name, f"belongs to a {layer}, which PEFT cannot adapt")
        return _KINDS[layer]

    def stack(self, name: str) -> StackedParameter:
        if name not in self.stacks:
            raise refused(name, "is no parameter of the loaded model")
        return self.stacks[name]

    def is_tied(self, name: str, checkpoint: Checkpoint) -> bool:
        return name in self.shared


def naming_as_loaded(checkpoint: Checkpoint) -> LoadedNaming:
    """Load the base with transformers, and take the names and kinds of its modules.

    Raises:
        InputError: the base is no folder that transformers can load.
        MissingPackageError: torch or transformers is not installed.
    """
    require("torch", extra="hf", why="see what transformers calls the base's modules")
    from kilodelta.models.layers import stacked_weights
    from kilodelta.models.load import open_model

    loaded = open_model(checkpoint.path)
    shared = tied(loaded.module.state_dict())
    return LoadedNaming(
        names=loaded.names,
        layers={path: _class(type(m)) for path, m in loaded.module.named_modules()},
        shared=frozenset(name for name, at in loaded.names.items() if at in shared),
        stacks={
            name: _parameter(loaded.module, loaded.names[name])
            for name in stacked_weights(loaded.module, loaded.names)
        },
    )


def _parameter(module: Any, state: str) -> StackedParameter:
    path, _, attribute = state.rpartition(".")
    layer = module.get_submodule(path)
    return StackedParameter(
        path=path,
        attribute=attribute,
        order=list(layer._parameters).index(attribute),
        in_out=bool(getattr(layer, "is_transposed", False)),
    )


def _class(kind: type) -> str:
    """Return the name of a class, or of the nearest of its bases that PEFT knows."""
    return next((base.__name__ for base in kind.__mro__ if base.__name__ in _KINDS), kind.__name__)
