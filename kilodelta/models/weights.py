"""Load a checkpoint's tensors into a module, by checkpoint name: copied, or mapped from the file.

`fill` writes into a module's tensors, `place` gives it new ones. Only the second can do without a
copy, and only for a module that nothing else shares memory with.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kilodelta.errors import CheckpointError
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.dtypes import DTYPES
from kilodelta.files.source import FileMap
from kilodelta.files.tensor import RawTensor
from kilodelta.files.tying import memory_of

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
    for name, state_name in names.items():
        values = tensor(source, name)
        _check_shape(source, name, state_name, state[state_name])
        write(state[state_name], values)


def write(place: Tensor, values: Tensor) -> None:
    """Copy values into a tensor of their shape; into a sharded one, the rows that it holds here.

    Args:
        place: a tensor, or a `DTensor` that is divided by its first axis (`fully_shard`).
        values: the whole values.

    Example:
        >>> place = torch.zeros(2, dtype=torch.bfloat16)
        >>> write(place, torch.tensor([1.0, 2.0]))
        >>> place.tolist()
        [1.0, 2.0]
    """
    mesh: Any = getattr(place, "device_mesh", None)
    if mesh is None:
        place.copy_(values)
        return
    # torch divides as `chunk` does: equal parts, the last ones shorter or empty.
    rows = -(-place.shape[0] // mesh.size())
    start = rows * mesh.get_local_rank()
    local(place).copy_(values[start : start + rows])


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor: the rows of a sharded one, or the tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    part: Tensor = tensor if to_local is None else to_local()
    return part


def place(
    module: nn.Module,
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    mapped: MappedCheckpoint | None = None,
) -> None:
    """Give a module new tensors with a checkpoint's values, in its own dtypes and on its device.

    Tied tensors stay tied. What else views the old tensors keeps the old values, so this is for
    modules that the library has built.

    Args:
        module: its tied tensors need one entry in `names`.
        checkpoint: what holds the values.
        names: checkpoint name to state name.
        mapped: the checkpoint's files as memory: a tensor that the module has in the same type is
            then no copy, but the file's own pages. What is written into it stays in this process.

    Raises:
        CheckpointError: a tensor is missing or has another shape; the module may then be half
            filled.
    """
    holders = _holders(module)
    for name, state_name in names.items():
        places = holders[state_name]
        _check_shape(checkpoint, name, state_name, places[0])
        read = None if mapped is None else mapped.tensor(name)
        read = tensor(checkpoint, name) if read is None else read
        values = read.to(places[0].device, places[0].dtype)
        for holder in places:
            holder.data = values
        if mapped is not None and values is not read:  # a copy: the file's pages are done with
            mapped.release([name])


def _holders(module: nn.Module) -> dict[str, list[Tensor]]:
    """List by state name the parameters or buffers that lie in its memory: tied ones together.

    The module alone holds their data, so that a tensor's memory is free when its place is taken.
    """
    state: dict[str, Tensor] = module.state_dict(keep_vars=True)
    found: dict[Hashable, list[Tensor]] = {}
    for held in {id(t): t for t in (*state.values(), *module.parameters())}.values():
        found.setdefault(memory_of(held), []).append(held)
    return {name: found[memory_of(held)] for name, held in state.items()}


def _check_shape(source: Checkpoint, name: str, state_name: str, place: Tensor) -> None:
    shape = source.info(name).shape
    if shape != tuple(place.shape):
        raise CheckpointError(
            f"{source.path}: tensor {name} has shape {shape}, "
            f"the model's {state_name} has {tuple(place.shape)}",
            fix="give a checkpoint of the same architecture",
        )


class MappedCheckpoint:
    """A checkpoint's tensors in the memory of its mapped files, read when they are touched.

    A file that is cut while this lives kills the process; one that is replaced stays as it was.

    Example:
        >>> base = Checkpoint.open("tests/golden/0.1.0/base.safetensors")
        >>> torch.equal(MappedCheckpoint(base).tensor("conv.weight"), tensor(base, "conv.weight"))
        True
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._maps: dict[Path, FileMap | None] = {}

    def tensor(self, name: str) -> Tensor | None:
        """Return a tensor in its own dtype, or None where its bytes cannot be used as they lie.

        Raises:
            CheckpointError: there is no such tensor.
        """
        shard, entry = self._checkpoint.entry(name)
        dtype = TORCH.get(entry.dtype)
        # A type that torch lacks, no bytes to point at, or numbers that begin at an odd place.
        if dtype is None or not entry.nbytes or entry.begin % dtype.itemsize:
            return None
        if shard.path not in self._maps:
            try:
                self._maps[shard.path] = shard.file.map()
            except OSError:  # a file system without maps
                self._maps[shard.path] = None
        file_map = self._maps[shard.path]
        if file_map is None:
            return None
        view = file_map.view(entry.begin, entry.nbytes)
        return torch.frombuffer(view, dtype=dtype).reshape(entry.shape)

    def release(self, names: Iterable[str]) -> None:
        """Give the memory of tensors back until they are read again; what was written is lost."""
        for name in names:
            shard, entry = self._checkpoint.entry(name)
            file_map = self._maps.get(shard.path)
            if file_map is not None:
                file_map.release(entry.begin, entry.nbytes)


def tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """Copy one tensor into memory, in its own dtype.

    Raises:
        CheckpointError: it is missing, or of a type that models do not compute with.
    """
    dtype_of(checkpoint, name)
    return values(checkpoint.raw(name))


def dtype_of(checkpoint: Checkpoint, name: str) -> torch.dtype:
    """Return a tensor's torch dtype.

    Raises:
        CheckpointError: it is missing, or of a type that models do not compute with.
    """
    info = checkpoint.info(name)
    if info.dtype not in TORCH:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {name} is {info.dtype}, which is no type to compute with",
            fix="give the checkpoint before quantisation",
        )
    return TORCH[info.dtype]


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
