"""Which modules a Uni-LoRA adapter adapts, in which order: its file holds a vector and a seed.

PEFT deals the vector out to layers in the order in which the model holds its modules, which no file
tells; so the base's class is asked.
"""

from __future__ import annotations

from kilodelta.compress.adapters.architecture import AdaptedArchitecture
from kilodelta.compress.adapters.peft.config import AdapterConfig
from kilodelta.compress.adapters.peft.keys import Module
from kilodelta.compress.adapters.peft.targeting import ADAPTED_KINDS, ALL_LINEAR, is_targeted
from kilodelta.errors import InputError

_FIX = "save the adapter with save_indices, so that its file says which layers take what"


def adapted_modules(config: AdapterConfig, architecture: AdaptedArchitecture) -> tuple[Module, ...]:
    """Return the adapted modules of the base, in the model's order.

    Raises:
        InputError: configuration and base do not tell which they are.
    """
    targets = config.values.get("target_modules")
    if targets is None or (isinstance(targets, str) and targets.lower() == ALL_LINEAR):
        raise InputError(f"{config.where}: target_modules is {targets!r:.60}", fix=_FIX)
    if architecture.module is None:
        raise InputError(
            f"only the model's code tells in which order {config.where} deals its vector out, and"
            f" transformers builds no model from {architecture.base.path}",
            fix=_FIX,
        )
    return tuple(
        Module(path=path, depth=0, owner=path, parts={})
        for path, kind in architecture.layers()
        if kind in ADAPTED_KINDS["UNILORA"] and is_targeted(path, config)
    )
