"""Load a checkpoint's tensors into a module, by checkpoint name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from kilodelta.errors import CheckpointError
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.dtypes import DTYPES
from kilodelta.files.tensor import RawTensor

_COMPUTED = ("BOOL", "U8", "I8", "I16", "I32", "I64", "F16", "BF16", "F32", "F64")

TORCH: dict[str, torch.dtype] = {name: getattr(torch, DTYPES[name].long) for name in _COMPUTED}
"""safetensors name to torch dtype, of the types that models compute with."""


def fill(module: nn.Module, checkpoint: Checkpoint | str | Path, names: Mapping[str, str]) -> None:
    """Copy tensors into a module, which keeps its own dtypes (bfloat16 to float32 is exact).

    Args:
        module: its tied tensors need one entry in `names`.
        checkpoint: what holds the values: the base, a tuned model or a merge result.
        names: checkpoint name to state name, as in `LoadedModel.names`.

    Raises:
        CheckpointError: a tensor is missing or has another shape; the module may then be half
            filled.
    """
    source, state = Checkpoint.open(checkpoint), module.state_dict()
    for name, place in names.items():
        values = tensor(source, name)
        if values.shape != state[place].shape:
            raise CheckpointError(
                f"{source.path}: tensor {name} has shape {tuple(values.shape)}, "
                f"the model's {place} has {tuple(state[place].shape)}",
                fix="give a checkpoint of the same architecture",
            )
        state[place].copy_(values)


def tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """Copy one tensor into memory, in its own dtype.

    Raises:
        CheckpointError: it is missing, or of a type that models do not compute with.
    """
    info = checkpoint.info(name)
    if info.dtype not in TORCH:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {name} is {info.dtype}, which is no type to compute with",
            fix="give the checkpoint before quantisation",
        )
    return values(checkpoint.raw(name))


def values(raw: RawTensor) -> Tensor:
    """Copy a tensor's raw bytes into a torch tensor of its dtype and shape.

    Example:
        >>> values(RawTensor.of(torch.tensor([[1.5, 2.0]]))).tolist()
        [[1.5, 2.0]]
    """
    dtype = TORCH[raw.dtype]
    if not raw.data.size:  # torch refuses to view an empty array as a wider type
        return torch.empty(raw.shape, dtype=dtype)
    return torch.from_numpy(raw.data.copy()).view(dtype).reshape(raw.shape)
