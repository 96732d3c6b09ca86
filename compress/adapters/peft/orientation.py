"""Which of the base's weights an adapter takes for (in, out), as a Conv1D stores them."""

from __future__ import annotations

from kilodelta.compress.adapters.peft.folder import Adapter
from kilodelta.compress.adapters.peft.names import ROOT
from kilodelta.models.layer_names import CONV1D_MODELS, is_conv1d, read_config


def is_transposed(adapter: Adapter, path: str, part: str) -> bool:
    """Whether a module's weight is (in, out).

    The first side of the tensor `part`, out, tells, but for a square weight: that is told by
    `is_conv1d_like`.
    """
    name = adapter.modules[path]
    shape = adapter.base.info(name).shape
    if len(shape) != 2:
        return False
    if shape[0] != shape[1]:
        return adapter.tensors.info(f"{ROOT}{path}.{part}").shape[0] == shape[1]
    return is_conv1d_like(adapter, name)


def is_conv1d_like(adapter: Adapter, name: str) -> bool:
    """Whether a weight is (in, out) by its model's kind, else as the configuration says: PEFT
    writes there what its last layer was."""
    config = read_config(adapter.base)
    if config.get("model_type") in CONV1D_MODELS:
        return is_conv1d(name, config)
    flag: bool = adapter.option("fan_in_fan_out", bool, False)
    return flag


def transposed_names(adapter: Adapter, part: str) -> list[str]:
    """The base's weights that are (in, out)."""
    return sorted(
        name for path, name in adapter.modules.items() if is_transposed(adapter, path, part)
    )
