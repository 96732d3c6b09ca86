"""Compute the digests of merged tensors without writing them."""

from __future__ import annotations

from kilodelta import parallel
from kilodelta.files import identity
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.source import TensorBytes
from kilodelta.files.tensor import TensorInfo
from kilodelta.format.delta import Delta
from kilodelta.merging import cpu
from kilodelta.merging.tensors import merged_whole
from kilodelta.progress import Meter, Progress, silent


def target_digests(
    delta: Delta,
    checkpoint: Checkpoint,
    *,
    threads: int | None = None,
    progress: Progress = silent,
) -> dict[str, str]:
    """Compute the digests of a bound delta's merged targets, in target order; of a stack one.

    Args:
        delta: bound to the base.
        checkpoint: the base.
        threads: cores to use; all by default.
        progress: receives how far the work is, in bytes.

    Raises:
        CheckpointError: a base tensor holds NaN or infinity.
        ProofError: an update takes a finite weight out of its type's range.
    """
    tensors = [checkpoint.info(name) for name in delta.tensors]
    meter = Meter("expand", sum(info.nbytes for info in tensors), "B", progress)
    digests = parallel.run(
        lambda info: _merged_digest(delta, info, checkpoint.tensor(info.name), meter),
        tensors,
        meter,
        weight=lambda info: info.nbytes,
        threads=threads,
    )
    return dict(zip(delta.tensors, digests, strict=True))


def _merged_digest(delta: Delta, info: TensorInfo, base: TensorBytes, meter: Meter) -> str:
    state = identity.tensor_hash(info.name, info.dtype, info.shape)
    for part in merged_whole(delta, info.name, base, cpu.merged):
        state.update(part.data)
        meter.add(part.nbytes)
    return "sha256:" + state.hexdigest()
