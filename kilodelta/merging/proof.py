"""Compute the digests of merged tensors without writing them."""

from __future__ import annotations

from kilodelta import parallel
from kilodelta.files import identity
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.source import TensorBytes
from kilodelta.format.delta import Delta
from kilodelta.format.targets import Target
from kilodelta.merging import cpu
from kilodelta.progress import Meter, Progress, silent


def target_digests(
    delta: Delta,
    checkpoint: Checkpoint,
    *,
    threads: int | None = None,
    progress: Progress = silent,
) -> dict[str, str]:
    """Compute the digests of a bound delta's merged targets, in target order.

    Args:
        delta: bound to the base.
        checkpoint: the base.
        threads: cores to use; all by default.
        progress: receives how far the work is, in bytes.

    Raises:
        CheckpointError: a base tensor holds NaN or infinity.
        ProofError: an update takes a finite weight out of its type's range.
    """
    targets = list(delta.targets.values())
    total = sum(checkpoint.info(target.name).nbytes for target in targets)
    meter = Meter("expand", total, "B", progress)
    digests = parallel.run(
        lambda target: _merged_digest(delta, target, checkpoint.tensor(target.name), meter),
        targets,
        meter,
        weight=lambda target: checkpoint.info(target.name).nbytes,
        threads=threads,
    )
    return dict(zip(delta.targets, digests, strict=True))


def _merged_digest(delta: Delta, target: Target, base: TensorBytes, meter: Meter) -> str:
    state = identity.tensor_hash(target.name, target.dtype, target.shape)
    for part in cpu.merged(delta, target, base):
        state.update(part.data)
        meter.add(part.nbytes)
    return "sha256:" + state.hexdigest()
