"""Which modules a Uni-LoRA adapter adapts, in which order: its file holds a vector and a seed.

PEFT deals the vector out to layers in the order in which the model holds its modules, which no file
tells; so the base is opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kilodelta.compress.adapters.peft.names import is_targeted
from kilodelta.errors import InputError
from kilodelta.files.checkpoint import Checkpoint

KINDS = frozenset({"Linear", "Conv1D"})
_UNSUPPORTED = ("exclude_modules", "layers_to_transform", "layers_pattern")


def adapted_modules(config: Mapping[str, Any], base: Checkpoint, where: Path) -> tuple[str, ...]:
    """Paths of the adapted modules of the base, in the model's order.

    Raises:
        InputError: the configuration does not tell which they are.
    """
    targets = config.get("target_modules")
    for name in _UNSUPPORTED:
        if config.get(name):
            raise InputError(f"{where}: {name} is {config[name]!r:.60}", fix=_FIX)
    if not isinstance(targets, (str, list)) or targets == "all-linear":
        raise InputError(f"{where}: target_modules is {targets!r:.60}", fix=_FIX)
    from kilodelta.models.load import open_model

    module = open_model(base.path).module
    return tuple(
        path
        for path, layer in module.named_modules()
        if type(layer).__name__ in KINDS and is_targeted(path, targets)
    )


_FIX = "save the adapter with save_indices, so that its file says which layers take what"
