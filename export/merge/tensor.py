"""Compute one merged tensor (or stored extra) in memory, for exporters that set weights one by one.

Whoever merges tensor by tensor proves all of them together afterwards (`require_result`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from kilodelta.errors import CheckpointError, ExportError, ProofError
from kilodelta.files import identity
from kilodelta.files.floats import cast, overflows
from kilodelta.files.tensor import Bytes, RawTensor, TensorInfo
from kilodelta.format.delta import Delta
from kilodelta.merging.tensors import merged_whole

if TYPE_CHECKING:
    from kilodelta.merging.cpu import ByteSource


def changed_names(delta: Delta) -> tuple[str, ...]:
    """Return the names of the tensors that a bound delta's targets are, then of its extras."""
    return (*delta.tensors, *delta.extras)


def merged_tensor(delta: Delta, name: str, base: Callable[[str], Bytes]) -> RawTensor:
    """Merge a tensor, or take an extra as it is stored.

    Args:
        delta: bound to its base.
        name: one of `changed_names(delta)`.
        base: gives a base tensor's raw bytes, uint8 `(n,)`.

    Raises:
        CheckpointError: the base tensor has another size, or holds NaN or infinity.
        ProofError: the update takes a finite weight out of its type's range.
    """
    if name in delta.extras:
        return delta.extras[name]
    info, position = merged_info(delta, name), 0
    data = np.empty(info.nbytes, np.uint8)
    for part in merged_parts(delta, name, base(name)):
        data[position : position + part.size] = part
        position += part.size
    return RawTensor(dtype=info.dtype, shape=info.shape, data=data)


def merged_info(delta: Delta, name: str) -> TensorInfo:
    """Describe a tensor of `delta.tensors`: it keeps the base's type and shape."""
    targets = delta.tensors[name]
    first = targets[0]
    shape = first.shape if first.part is None else (len(targets), *first.shape)
    return TensorInfo(name=name, dtype=first.dtype, shape=shape)


def merged_parts(delta: Delta, name: str, base: ByteSource) -> Iterator[Bytes]:
    """Merge a tensor piece by piece: whole rows, uint8 `(n,)`, each overwritten by the next.

    Args:
        delta: bound to its base.
        name: one of `delta.tensors`.
        base: the base tensor's raw bytes, or a file that is read as it is sliced.

    Raises:
        CheckpointError: the base tensor has another size, or holds NaN or infinity.
        ProofError: the update takes a finite weight out of its type's range.
    """
    from kilodelta.merging import cpu  # loads the kernels

    info = merged_info(delta, name)
    if base.size != info.nbytes:
        raise CheckpointError(
            f"{name} has {base.size} bytes, but {info.dtype} {info.shape} takes {info.nbytes}",
            fix="give the exact base, or the part of it that was kept for this use",
        )
    yield from merged_whole(delta, name, base, cpu.merged)


def rounded(name: str, tensor: RawTensor, dtype: str) -> Bytes:
    """Round a tensor's raw bytes to another precision, to nearest even.

    Args:
        name: the tensor's, for the error.
        tensor: what to round.
        dtype: a safetensors dtype.

    Raises:
        ExportError: a finite value does not fit.
    """
    if (tensor.dtype, dtype) == ("F32", "F16"):
        from kilodelta.exact.rounding import narrow_f16  # ten times as fast as numpy

        halves = np.empty(tensor.data.size // 4, np.uint16)
        if not narrow_f16(tensor.data.view(np.float32), halves):
            return halves.view(np.uint8)
    values = cast(tensor.data, tensor.dtype, dtype)
    if overflows(tensor.data, tensor.dtype, values, dtype):
        raise ExportError(
            f"{name} holds values beyond {dtype}", fix="export the base in bfloat16 or float32"
        )
    return values


def require_result(delta: Delta, digests: Mapping[str, str]) -> None:
    """See that merged targets are the ones that the file promises.

    Args:
        delta: bound to its base.
        digests: of every merged tensor, by name.

    Raises:
        ProofError: they are not.
    """
    root = identity.root(digests[name] for name in delta.tensors)
    if root != delta.manifest.result:
        raise ProofError(
            f"the merged targets have root {root}, the file says {delta.manifest.result}",
            fix="the file is damaged, or its maker's machine computed wrongly: fetch it again",
        )
