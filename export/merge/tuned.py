"""One changed tensor, whole and in memory: for whatever takes weights one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kilodelta.errors import CheckpointError, ExportError
from kilodelta.files import dtypes, identity
from kilodelta.files.floats import cast, overflows
from kilodelta.files.tensor import RawTensor
from kilodelta.format.delta import Delta

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Tuned(RawTensor):
    """A tensor of the fine-tune, and its digest where it is a target."""

    digest: str = ""


def changed(delta: Delta) -> tuple[str, ...]:
    """The names of a bound delta's targets and extras."""
    return (*delta.targets, *delta.extras)


def tuned(delta: Delta, name: str, base: Callable[[str], Bytes]) -> Tuned:
    """A target merged, or an extra as it is stored.

    Args:
        delta: bound to its base.
        name: one of `changed(delta)`.
        base: gives a base tensor's raw bytes.

    Raises:
        CheckpointError: the base tensor has another size, or holds NaN or infinity.
        ProofError: the update takes a finite weight out of its type's range.
    """
    if name in delta.extras:
        extra = delta.extras[name]
        return Tuned(dtype=extra.dtype, shape=extra.shape, data=extra.data)
    from kilodelta.merging import arithmetic  # loads the kernels

    target, position = delta.target(name), 0
    source, size = base(name), dtypes.nbytes(target.dtype, target.shape)
    if source.size != size:
        raise CheckpointError(
            f"{name} has {source.size} bytes, but {target.dtype} {target.shape} takes {size}",
            fix="give the exact base, or the part of it that was kept for this use",
        )
    data = np.empty(size, np.uint8)
    for part in arithmetic.merged(delta, target, source):
        data[position : position + part.size] = part
        position += part.size
    digest = identity.tensor_digest(name, target.dtype, target.shape, data.data)
    return Tuned(dtype=target.dtype, shape=target.shape, data=data, digest=digest)


def rounded(name: str, found: RawTensor, dtype: str) -> Bytes:
    """Its raw bytes in another precision, to nearest even.

    Raises:
        ExportError: a finite value does not fit.
    """
    values = cast(found.data, found.dtype, dtype)
    if overflows(found.data, found.dtype, values, dtype):
        raise ExportError(
            f"{name} holds values beyond {dtype}", fix="export the base in bfloat16 or float32"
        )
    return values
