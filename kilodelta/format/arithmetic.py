"""Merging: base bytes in, merged bytes out, bit for bit the same on every machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ldexp
from typing import Any

import numpy as np
import numpy.typing as npt

from kilodelta.errors import CheckpointError, ProofError
from kilodelta.format import exact, identity, parallel, rounding
from kilodelta.format.checkpoint import Checkpoint
from kilodelta.format.delta import Delta
from kilodelta.format.targets import Target
from kilodelta.progress import Meter, Progress, silent

CHUNK = 1 << 17
"""Elements merged at a time: their float64 update, 1 MiB, stays in the second cache."""
TALL = 512
"""Rows at a time where the product is a large one, so that it runs at full speed."""

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class _Update:
    """A target's update in the orientation in which the tensor is stored."""

    delta: Delta
    target: Target

    def factors(self) -> tuple[Any, Any]:
        """(left of given rows, right)."""
        delta, target = self.delta, self.target
        method, stream, q = delta.method, delta.stream, delta.coefficients(target.name)
        if not target.transposed:
            return lambda rows: method.left(q, target, stream, rows), method.right(
                q, target, stream
            )
        left = np.ascontiguousarray(method.right(q, target, stream).T)
        right = method.left(q, target, stream, range(target.matrix[0])).T
        return lambda rows: left[rows.start : rows.stop], np.ascontiguousarray(right)


def merged(delta: Delta, target: Target, base: Bytes) -> Iterator[Bytes]:
    """The merged tensor's bytes, chunk by chunk in order; each is overwritten by the next.

    Args:
        delta: bound to the base.
        base: the base tensor's raw bytes, uint8 (n,).

    Raises:
        CheckpointError: the base tensor holds NaN or infinity.
        ProofError: the update takes a finite weight out of its type's range.
    """
    view, add = rounding.ADD[target.dtype]
    rows, columns = target.stored
    weights = base.view(view).reshape(rows, columns)
    left, right = _Update(delta, target).factors()
    c, e = delta.scale(target.name)
    factor, scale = np.float64(c), np.float32(ldexp(1.0, max(e, -149)))
    step = _step(columns, right.shape[0])
    out = np.empty(min(step, rows) * columns, view)
    for start in range(0, rows, step):
        span = range(start, min(rows, start + step))
        numbers = exact.product(left(span), right).reshape(-1)
        part = out[: numbers.size]
        chunk = weights[span.start : span.stop].reshape(-1)
        if add(chunk, numbers, factor, scale, part):
            raise _not_finite(target, chunk)
        yield part.view(np.uint8)


def _step(columns: int, inner: int) -> int:
    rows = max(1, CHUNK // columns)
    return rows if inner <= exact.FEW else max(rows, TALL)


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
