"""Merging: base bytes in, merged bytes out, bit for bit the same on every machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ldexp
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kilodelta.errors import CheckpointError, ProofError
from kilodelta.exact import fused, ordered, products, rounding
from kilodelta.files import identity, parallel
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.delta import Delta
from kilodelta.format.targets import Target
from kilodelta.progress import Meter, Progress, silent

CHUNK = 1 << 17
"""Elements merged at a time, written and hashed while they are in the second cache."""
LARGE = 1 << 23
"""Elements at a time where the product is a large one, so that it runs at full speed."""

BAND = 1 << 15
"""Elements of the left factor drawn at a time."""

Bytes = npt.NDArray[np.uint8]


class Source(Protocol):
    """A tensor's raw bytes, uint8 `(size,)`: an array, or a file that is read as it is sliced."""

    @property
    def size(self) -> int: ...

    def __getitem__(self, span: slice, /) -> Bytes: ...


@dataclass(frozen=True)
class _Update:
    """A target's update in the orientation in which the tensor is stored."""

    delta: Delta
    target: Target

    def factors(self) -> tuple[Any, Any]:
        """(left of given rows, right)."""
        delta, target = self.delta, self.target
        method, stream, q = delta.form, delta.stream, delta.coefficients(target.name)
        if not target.transposed and delta.manifest.compat is None:
            return lambda rows: method.left(q, target, stream, rows), method.right(
                q, target, stream
            )
        whole = method.left(q, target, stream, range(target.matrix[0]))
        left, right = whole, method.right(q, target, stream)
        if target.transposed:
            left, right = np.ascontiguousarray(right.T), np.ascontiguousarray(left.T)
        return lambda rows: left[rows.start : rows.stop], right


def merged(delta: Delta, target: Target, base: Source) -> Iterator[Bytes]:
    """The merged tensor's bytes, chunk by chunk in order; each is overwritten by the next.

    Args:
        delta: bound to the base.
        base: the base tensor's raw bytes; sliced in order, each slice used before the next.

    Raises:
        CheckpointError: the base tensor holds NaN or infinity.
        ProofError: the update takes a finite weight out of its type's range.
    """
    view, _ = rounding.ADD[target.dtype]
    rows, columns = target.stored
    row = base.size // rows
    left, right = _Update(delta, target).factors()
    add = _adder(delta, target, right)
    step = min(rows, _step(columns, right.shape[0]))
    out = np.empty((step, columns), view)
    for span, factors in _bands(left, rows, step, right.shape[0]):
        raw, part = base[span.start * row : span.stop * row], out[: len(span)]
        chunk = raw.view(view).reshape(len(span), columns)
        if add(factors, chunk, part):
            raise _not_finite(target, chunk.reshape(-1))
        yield part.reshape(-1).view(np.uint8)


def _adder(delta: Delta, target: Target, right: Any) -> Callable[[Any, Any, Any], Any]:
    """The function of (left rows, weights, out) that merges rows and says if one is not finite."""
    if delta.manifest.compat is not None:
        scaling = np.float64(delta.manifest.compat.scaling)
        return _after(ordered.multiplier(right), target.dtype, scaling, np.float32(1))
    c, e = delta.scale(target.name)
    bound = delta.method.bound(delta.coefficients(target.name))
    scale = np.float32(ldexp(1.0, max(e, -149)))
    return _exact_adder(target.dtype, right, bound, np.float64(c), scale)


def _exact_adder(
    dtype: str, right: Any, bound: int, factor: np.float64, scale: np.float32
) -> Callable[[Any, Any, Any], Any]:
    if right.shape[0] <= fused.FEW:
        floats, merge = np.ascontiguousarray(right, dtype=np.float64), fused.MERGE[dtype]
        return lambda left, weights, out: merge(
            left.astype(np.float64), floats, weights, factor, scale, out
        )
    return _after(products.multiplier(right, bound), dtype, factor, scale)


def _after(
    multiply: Callable[[Any], Any], dtype: str, factor: np.float64, scale: np.float32
) -> Callable[[Any, Any, Any], Any]:
    """First the product, then the addition."""
    _, add = rounding.ADD[dtype]
    return lambda left, weights, out: add(
        weights.reshape(-1),
        multiply(left).reshape(-1),
        factor,
        scale,
        out.reshape(-1),
    )


def _step(columns: int, inner: int) -> int:
    return max(1, (CHUNK if inner <= fused.FEW else LARGE) // columns)


def _bands(
    left: Callable[[range], Any], rows: int, step: int, inner: int
) -> Iterator[tuple[range, Any]]:
    """Steps of rows with their left factors, which are drawn for many steps at once."""
    tall = max(step, BAND // inner // step * step)
    for top in range(0, rows, tall):
        band = left(range(top, min(rows, top + tall)))
        for start in range(0, len(band), step):
            part = band[start : start + step]
            yield range(top + start, top + start + len(part)), part


def _not_finite(target: Target, chunk: npt.NDArray[Any]) -> Exception:
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


def merged_digest(delta: Delta, target: Target, base: Bytes, meter: Meter) -> str:
    """The digest of one merged tensor, without writing it."""
    state = identity.tensor_hash(target.name, target.dtype, target.shape)
    for part in merged(delta, target, base):
        state.update(part.data)
        meter.add(part.nbytes)
    return "sha256:" + state.hexdigest()


def target_digests(
    delta: Delta,
    checkpoint: Checkpoint,
    *,
    threads: int | None = None,
    progress: Progress = silent,
) -> dict[str, str]:
    """The digests of a bound delta's merged targets, in target order."""
    targets = list(delta.targets.values())
    total = sum(checkpoint.info(target.name).nbytes for target in targets)
    meter = Meter("expand", total, "B", progress)
    digests = parallel.run(
        lambda target: merged_digest(delta, target, checkpoint.data(target.name), meter),
        targets,
        meter,
        weight=lambda target: checkpoint.info(target.name).nbytes,
        threads=threads,
    )
    return dict(zip(delta.targets, digests, strict=True))
