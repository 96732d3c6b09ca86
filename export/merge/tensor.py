"""Compute one merged tensor (or stored extra) in memory, for exporters that set weights one by one.

Whoever merges tensor by tensor proves all of them together afterwards (`require_result`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from kilodelta.errors import CheckpointError, ExportError, ProofError
from kilodelta.files import dtypes, identity
from kilodelta.files.floats import cast, overflows
from kilodelta.files.tensor import Bytes, RawTensor
from kilodelta.format.delta import Delta

if TYPE_CHECKING:
    from kilodelta.merging.cpu import ByteSource


def changed_names(delta: Delta) -> tuple[str, ...]:
    """Return the names of a bound delta's targets, then of its extras."""
    return (*delta.targets, *delta.extras)


def merged_tensor(delta: Delta, name: str, base: Callable[[str], Bytes]) -> RawTensor:
    """Merge a target, or take an extra as it is stored.

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
    target, position = delta.target(name), 0
    data = np.empty(dtypes.nbytes(target.dtype, target.shape), np.uint8)
    for part in merged_parts(delta, name, base(name)):
        data[position : position + part.size] = part
        position += part.size
    return RawTensor(dtype=target.dtype, shape=target.shape, data=data)


def merged_parts(delta: Delta, name: str, base: ByteSource) -> Iterator[Bytes]:
    """Merge a target piece by piece: whole rows, uint8 `(n,)`, each overwritten by the next.

    Args:
        delta: bound to its base.
        name: one of its targets.
        base: the base tensor's raw bytes, or a file that is read as it is sliced.

    Raises:
        CheckpointError: the base tensor has another size, or holds NaN or infinity.
        ProofError: the update takes a finite weight out of its type's range.
    """
    from kilodelta.merging import cpu  # loads the kernels

    target = delta.target(name)
    size = dtypes.nbytes(target.dtype, target.shape)
    if base.size != size:
        raise CheckpointError(
            f"{name} has {base.size} bytes, but {target.dtype} {target.shape} takes {size}",
            fix="give the exact base, or the part of it that was kept for this use",
        )
    yield from cpu.merged(delta, target, base)


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
        digests: of every merged target, by name.

    Raises:
        ProofError: they are not.
    """
    root = identity.root(digests[name] for name in delta.targets)
    if root != delta.manifest.result:
        raise ProofError(
            f"the merged targets have root {root}, the file says {delta.manifest.result}",
            fix="the file is damaged, or its maker's machine computed wrongly: fetch it again",
        )
