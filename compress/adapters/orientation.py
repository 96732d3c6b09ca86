"""Which of the base's weights an adapter takes for (in, out), as a Conv1D stores them."""

from __future__ import annotations

from kilodelta.compress.adapters.adapter import Adapter
from kilodelta.compress.adapters.peft_names import ROOT
from kilodelta.format.layers import is_conv1d, read_config


def is_transposed(adapter: Adapter, path: str, part: str) -> bool:
    """Whether a module's weight is (in, out).

    The first side of the tensor `part`, out, tells, but for a square weight: that is by its model's
    kind a Conv1D, or as the configuration says.
    """
    name = adapter.modules[path]
    shape = adapter.base.info(name).shape
    if len(shape) != 2:
        return False
    if shape[0] != shape[1]:
        return adapter.tensors.info(f"{ROOT}{path}.{part}").shape[0] == shape[1]
    flag: bool = adapter.option("fan_in_fan_out", bool, False)
    return flag or is_conv1d(name, read_config(adapter.base))


def transposed_names(adapter: Adapter, part: str) -> list[str]:
    """The base's weights that are (in, out)."""
    return sorted(
        name for path, name in adapter.modules.items() if is_transposed(adapter, path, part)
    )
