"""Merge one tensor: base bytes in, merged bytes out, bit for bit the same on every machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kilodelta.errors import CheckpointError, ProofError
from kilodelta.exact import fused, ordered, products, rounding
from kilodelta.exact.bounds import unit
from kilodelta.files.tensor import Bytes
from kilodelta.format.delta import Delta
from kilodelta.format.targets import Target

CHUNK = 1 << 17
"""Elements merged at a time, written and hashed while they are in the second cache."""
LARGE = 1 << 23
"""Elements at a time where the product is a large one, so that it runs at full speed."""
BAND = 1 << 15
"""Elements of the left factor drawn at a time."""


class ByteSource(Protocol):
    """A tensor's raw bytes, uint8 `(size,)`: an array, or a file that is read as it is sliced."""

    @property
    def size(self) -> int: ...

    def __getitem__(self, span: slice, /) -> Bytes: ...


Left = Callable[[range], Any]
"""From a range of stored rows to their part of the left factor, (rows, K)."""
Add = Callable[[Any, Any, Any], Any]
"""From (left rows, weights, out) to whether a merged weight is not finite; fills `out`."""


def merged(delta: Delta, target: Target, base: ByteSource) -> Iterator[Bytes]:
    """Yield the merged tensor's bytes, piece by piece in order; each is overwritten by the next.

    Args:
        delta: bound to the base.
        target: one of its targets.
        base: the base tensor's raw bytes; sliced in order, each slice used before the next.

    Raises:
        CheckpointError: the base tensor holds NaN or infinity.
        ProofError: the update takes a finite weight out of its type's range.

    Example:
        >>> import kilodelta
        >>> base = kilodelta.Checkpoint.open("tests/golden/0.1.0/base.safetensors")
        >>> delta = kilodelta.load("tests/golden/0.1.0/lora-8.kd", base=base)
        >>> tall = delta.target("tall.weight")
        >>> sum(part.nbytes for part in merged(delta, tall, base.data(tall.name)))
        88
    """
    view, _ = rounding.ADD[target.dtype]
    rows, columns = target.stored
    row = base.size // rows
    left, right = stored_factors(delta, target)
    add = _adder(delta, target, right)
    # A BLAS product has to be large to run at full speed; the fused kernel has to stay in cache.
    step = min(rows, max(1, (CHUNK if right.shape[0] <= fused.FEW else LARGE) // columns))
    out = np.empty((step, columns), view)
    for span, factors in bands(left, rows, step, right.shape[0]):
        raw, part = base[span.start * row : span.stop * row], out[: len(span)]
        chunk = raw.view(view).reshape(len(span), columns)
        if add(factors, chunk, part):
            raise _not_finite(target, chunk.reshape(-1))
        yield part.reshape(-1).view(np.uint8)


def stored_factors(delta: Delta, target: Target) -> tuple[Left, Any]:
    """Return the update's factors in the orientation in which the tensor is stored."""
    form, stream, q = delta.form, delta.stream, delta.coefficients(target.name)
    right = form.right(q, target, stream)
    if not target.transposed and delta.manifest.compat is None:
        return lambda rows: form.left(q, target, stream, rows), right
    # A compatibility form rebuilds its whole basis at each call, so the left factor is made once.
    left = form.left(q, target, stream, range(target.matrix[0]))
    if target.transposed:
        left, right = np.ascontiguousarray(right.T), np.ascontiguousarray(left.T)
    return lambda rows: left[rows.start : rows.stop], right


def _adder(delta: Delta, target: Target, right: Any) -> Add:
    """Return the fastest way to multiply with the right factor, add and round."""
    compat = delta.manifest.compat
    if compat is not None:
        multiply = ordered.multiplier(right)
        # A float form's scale is applied in float64, and the update rounded to float32 once.
        return _after(multiply, target.dtype, np.float64(compat.scaling), np.float32(1))
    c, e = delta.scale(target.name)
    bound = delta.bound(target.name)
    factor, scale = np.float64(c), np.float32(unit(bound, e))
    if right.shape[0] > fused.FEW:
        return _after(products.multiplier(right, bound), target.dtype, factor, scale)
    dtype, merge = fused.narrowest(bound), fused.MERGE[target.dtype]
    floats = np.ascontiguousarray(right, dtype=dtype)
    return lambda left, weights, out: merge(left.astype(dtype), floats, weights, factor, scale, out)


def _after(
    multiply: Callable[[Any], Any], dtype: str, factor: np.float64, scale: np.float32
) -> Add:
    """Multiply first, then add and round."""
    _, add = rounding.ADD[dtype]
    return lambda left, weights, out: add(
        weights.reshape(-1), multiply(left).reshape(-1), factor, scale, out.reshape(-1)
    )


def bands(left: Left, rows: int, step: int, inner: int) -> Iterator[tuple[range, Any]]:
    """Yield steps of rows with their left factors, which are drawn for many steps at once.

    Args:
        left: draws a range of rows.
        rows: of the stored matrix.
        step: rows of a step.
        inner: K, entries of a row of the left factor.
    """
    # A multiple of the step, so that no step needs the rows of two bands.
    tall = max(step, BAND // inner // step * step)
    for top in range(0, rows, tall):
        band = left(range(top, min(rows, top + tall)))
        for start in range(0, len(band), step):
            part = band[start : start + step]
            yield range(top + start, top + start + len(part)), part


def _not_finite(target: Target, chunk: npt.NDArray[Any]) -> Exception:
    """Tell a base that is not finite from an update that leaves the range of its type."""
    # An update of zeros keeps every weight: what is not finite now was so in the base.
    zeros, out = np.zeros(chunk.size), np.empty_like(chunk)
    if rounding.ADD[target.dtype][1](chunk, zeros, np.float64(1), np.float32(1), out):
        return CheckpointError(
            f"the base tensor {target.name} holds NaN or infinity",
            fix="no exact result exists: repair the base, or leave the tensor out of the targets",
        )
    return ProofError(
        f"the update takes {target.name} out of the range of {target.dtype}",
        fix="the delta does not belong to this base, or its scales are wrong",
    )
