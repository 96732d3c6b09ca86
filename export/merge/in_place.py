"""Merge into a model that is loaded already, in place, on any device.

A distributed tensor (DTensor, as FSDP2 and tensor parallelism make them) is merged by every rank on
its own: bases have coordinates, so a rank draws its rows and columns and nothing else.

The merged tensors are hashed before the first of them is written, so a model that the delta was not
made for is left as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from kilodelta.errors import BaseMismatchError, InputError, ProofError
from kilodelta.export.merge.tensor import merged_info
from kilodelta.files import identity
from kilodelta.files.tensor import TensorInfo
from kilodelta.format.delta import Delta
from kilodelta.format.targets import Target
from kilodelta.merging.gpu.choose import unit_for
from kilodelta.merging.gpu.device_update import DeviceUpdate
from kilodelta.merging.gpu.unit import DTYPES, TORCH


def merge_into(
    model: nn.Module,
    delta: Delta,
    *,
    names: Mapping[str, str] = MappingProxyType({}),
    prove: bool = True,
) -> str:
    """Merge a delta into a loaded base model, extras too; returns the root over the targets.

    With distributed tensors every rank calls it; a proof gathers one tensor at a time.

    Args:
        delta: bound to the base (`kilodelta.load(path, base=...)`).
        names: from the checkpoint's names to the model's, where they differ.
        prove: compute the merged tensors once more before, and compare their digest with the
            file's. Without it the root that is returned is the file's own word.

    Raises:
        BaseMismatchError: the model lacks a tensor, or has it in another shape or dtype.
        ProofError: the result's digest is not the file's; the model is as it was.
        InputError: a tensor is distributed in a way that has no rows and columns.
    """
    state = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    tensors = {
        name: _tensor(state, names.get(name, name), merged_info(delta, name))
        for name in delta.tensors
    }
    extras = {name: _room(state, names.get(name, name), delta, name) for name in delta.extras}
    values = {name: _extra(delta, name) for name in extras}
    with torch.no_grad():
        if prove:
            _prove(delta, tensors)
        for name, tensor in tensors.items():
            for target, part in _matrices(delta, name, tensor):
                _local(part).copy_(_merged(delta, target, part))
        for name, tensor in extras.items():
            _fill(tensor, values[name])
    return delta.manifest.result


def _tensor(state: Mapping[str, Any], name: str, info: TensorInfo) -> Tensor:
    tensor = _known(state, name)
    if tuple(tensor.shape) != info.shape or DTYPES.get(tensor.dtype) != info.dtype:
        raise BaseMismatchError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)}, "
            f"the delta wants {info.dtype} {info.shape}",
            fix="load the base in the type of its files: its digest is over those bytes",
        )
    if tensor.is_meta:
        raise InputError(f"{name} has no data yet", fix="load the base's weights first")
    return tensor


def _known(state: Mapping[str, Any], name: str) -> Tensor:
    if name not in state:
        raise BaseMismatchError(
            f"the model has no tensor {name!r}",
            fix="give names={checkpoint's name: the model's name}",
        )
    tensor: Tensor = state[name]
    return tensor


def _room(state: Mapping[str, Any], name: str, delta: Delta, extra: str) -> Tensor:
    tensor, shape = _known(state, name), delta.extras[extra].shape
    if tuple(tensor.shape) != shape:
        raise BaseMismatchError(
            f"{name} has shape {tuple(tensor.shape)}, the delta stores {shape} for it",
            fix="build the model with the fine-tune's head, such as num_labels",
        )
    return tensor


def _prove(delta: Delta, tensors: Mapping[str, Tensor]) -> None:
    digests = []
    for name, tensor in tensors.items():
        info = merged_info(delta, name)
        state = identity.tensor_hash(name, info.dtype, info.shape)
        # The digest is over the whole tensor; a matrix at a time is gathered, so memory grows by
        # one.
        for target, part in _matrices(delta, name, tensor):
            whole = _gathered(part, _merged(delta, target, part))
            raw = whole.cpu().contiguous().view(-1).view(torch.uint8).numpy()
            state.update(raw.data)
        digests.append("sha256:" + state.hexdigest())
    root = identity.root(digests)
    if root != delta.manifest.result:
        raise ProofError(
            f"the merged targets have root {root}, the file says {delta.manifest.result}",
            fix="the model is not the base, or was changed: load the base anew; nothing was merged",
        )


def _matrices(delta: Delta, name: str, tensor: Tensor) -> Iterator[tuple[Target, Tensor]]:
    """Yield a tensor's targets, each with the tensor or its matrix of the stack, a view.

    Raises:
        InputError: the tensor is a stack, and distributed.
    """
    for target in delta.tensors[name]:
        if target.part is not None and _is_distributed(tensor):
            raise InputError(
                f"{name} holds {len(tensor)} matrices in one distributed tensor",
                fix="merge into files (kilodelta merge), and load the merged model",
            )
        yield target, tensor if target.part is None else tensor[target.part]


def _merged(delta: Delta, target: Target, tensor: Tensor) -> Tensor:
    """Compute the merged tensor, or this rank's part of it."""
    local = _local(tensor)
    # A rank may hold no rows of a tensor that is shorter than the mesh.
    if not local.numel():
        return local
    rows, columns = _box(tensor, target)
    update = DeviceUpdate(delta, target, unit_for(local.device, delta.method))
    matrix = local.contiguous().view(len(rows), len(columns))
    new, flag = update.merge(matrix, rows, columns)
    if flag.any():
        raise ProofError(
            f"{target.name} holds NaN or infinity, or the update leaves the range of its type",
            fix="the model is not the base that the delta was made for",
        )
    return new.view(local.shape)


def _local(tensor: Tensor) -> Tensor:
    local: Tensor = tensor.to_local() if _is_distributed(tensor) else tensor  # type: ignore[attr-defined]
    return local


def _is_distributed(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")


def _box(tensor: Tensor, target: Target) -> tuple[range, range]:
    """Return the rows and columns of the stored matrix that this process holds."""
    rows, columns = target.stored
    if not _is_distributed(tensor):
        return range(rows), range(columns)
    shape, offset = _place(tensor)
    if len(shape) > 2 and shape[1:] != tuple(tensor.shape[1:]):
        raise InputError(
            f"{target.name} is cut along another dimension than the first",
            fix="shard convolutions along their first dimension",
        )
    down = range(offset[0], offset[0] + shape[0])
    if len(shape) > 2:
        return down, range(columns)
    return down, range(offset[1], offset[1] + shape[1])


def _place(tensor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(shape, offset) of this rank's part."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    odd = [p for p in tensor.placements if type(p) not in (Replicate, Shard)]
    if odd:
        raise InputError(
            f"a tensor is distributed as {odd[0]}", fix="shard or replicate it, nothing else"
        )
    return compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )


def _gathered(like: Any, part: Tensor) -> Tensor:
    if not _is_distributed(like):
        return part
    from torch.distributed.tensor import DTensor

    whole: Tensor = DTensor.from_local(
        part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    ).full_tensor()
    return whole


def _extra(delta: Delta, name: str) -> Tensor:
    extra = delta.extras[name]
    # A copy: the extra's bytes may be mapped read-only, of which torch warns.
    data = torch.from_numpy(extra.data.copy())
    dtype = TORCH.get(extra.dtype)
    if dtype is None:
        raise InputError(f"extra {name} is {extra.dtype}", fix="merge into files: kilodelta merge")
    return data.view(dtype).view(extra.shape)


def _fill(tensor: Any, value: Tensor) -> None:
    """Copy a whole tensor, or this rank's part of it."""
    local = _local(tensor)
    if _is_distributed(tensor):
        shape, offset = _place(tensor)
        for axis, (start, size) in enumerate(zip(offset, shape, strict=True)):
            value = value.narrow(axis, start, size)
    local.copy_(value)
