"""Streaming merge: base and delta in, safetensors out, the result proved while it is written.

Untouched tensors are copied by the kernel, targets go through one small reused buffer a thread,
and the output takes its name only after its digest has come out right.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kilodelta.errors import InputError, OutputError, ProofError
from kilodelta.exact.selftest import require_good_kernels
from kilodelta.export.merge.expanders import Expander, expander
from kilodelta.export.merge.plan import FilePlan, Piece, plan_checkpoint
from kilodelta.export.merge.sidecars import copy_sidecars
from kilodelta.files import identity, parallel, staging
from kilodelta.files.baseline import require_base
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.copying import copy_range, pwrite
from kilodelta.format.delta import Delta
from kilodelta.format.file import load
from kilodelta.progress import Meter, Progress, silent

COPY = 64 << 20
"""Bytes that the kernel copies between two reports of progress."""


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What a merge wrote: its place, the proved root over the targets, and counts."""

    path: Path
    result: str
    targets: int
    extras: int
    copied: int
    nbytes: int
    left_out: tuple[str, ...]
    """Files of the base folder that hold the base's weights in another form, not copied."""


def merge(
    base: str | os.PathLike[str] | Checkpoint,
    delta: str | os.PathLike[str] | Delta,
    out: str | os.PathLike[str],
    *,
    threads: int | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> Merged:
    """Write the fine-tuned model: a `.safetensors` file, or a folder like the base's.

    Args:
        base: the model the delta was made for.
        delta: a `.kd` file or a `Delta`.
        out: a new path; `.safetensors` for one file, else a folder with the base's sharding,
            configuration and tokenizer.
        threads: cores to use; all by default.
        device: `cpu`, or `cuda` or `cuda:N` for a GPU, whose memory need not hold the model.

    Raises:
        BaseMismatchError: `base` is another model; nothing is written.
        CheckpointError: the base cannot be read, or a target holds NaN or infinity.
        ProofError: the result's digest is not the file's; nothing is left behind.
        OutputError: `out` exists or cannot be written.
        InputError: there is no such device.
        SelfTestError: the CPU or the device computes wrongly.
    """
    require_good_kernels()
    way = expander(device)
    checkpoint = Checkpoint.open(base if isinstance(base, Checkpoint) else Path(base))
    place = Path(out)
    single = place.suffix == ".safetensors"
    if single and len(checkpoint.shards) > 1:
        raise InputError(
            f"{checkpoint.path} has {len(checkpoint.shards)} shards, {place} is one file",
            fix="give a folder as output",
        )
    if single and place.exists():
        raise OutputError(f"{place} exists already", fix="give a new name, or remove this file")
    found = delta if isinstance(delta, Delta) else load(delta)
    require_base(checkpoint, found.manifest.base, threads=threads, progress=progress)
    bound = found.bind(checkpoint)
    with staging.new_file(place) if single else staging.new_folder(place) as stage:
        plans = plan_checkpoint(checkpoint, bound, stage, single=single)
        _run(checkpoint, bound, plans, way, threads or way.threads, progress)
        left_out = () if single else copy_sidecars(checkpoint, bound, stage)
    return _summary(checkpoint, bound, plans, place, left_out)


def _summary(
    checkpoint: Checkpoint,
    delta: Delta,
    plans: list[FilePlan],
    place: Path,
    left_out: tuple[str, ...],
) -> Merged:
    return Merged(
        path=place,
        result=delta.manifest.result,
        targets=len(delta.targets),
        extras=len(delta.extras),
        copied=len(checkpoint.names)
        - len(delta.targets)
        - len(delta.extras.keys() & set(checkpoint.names)),
        nbytes=sum(plan.size for plan in plans),
        left_out=left_out,
    )


@dataclass(frozen=True)
class _Job:
    """Pieces of one output file that belong together, on an open descriptor."""

    descriptor: int
    plan: FilePlan
    piece: Piece


def _run(
    checkpoint: Checkpoint,
    delta: Delta,
    plans: list[FilePlan],
    way: Expander,
    threads: int | None,
    progress: Progress,
) -> None:
    meter = Meter("merge", sum(plan.size for plan in plans), "B", progress)
    with _opened(plans) as files:
        jobs = [_Job(files[plan.path], plan, piece) for plan in plans for piece in plan.pieces]
        digests = parallel.run(
            lambda job: _write(checkpoint, delta, way, job, meter),
            jobs,
            meter,
            weight=lambda job: job.piece.nbytes,
            threads=threads,
        )
    found = {job.piece.name: text for job, text in zip(jobs, digests, strict=True) if text}
    require_result(delta, found)


@contextmanager
def _opened(plans: list[FilePlan]) -> Iterator[Mapping[Path, int]]:
    files: dict[Path, int] = {}
    try:
        for plan in plans:
            files[plan.path] = os.open(plan.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            os.ftruncate(files[plan.path], plan.size)
            os.pwrite(files[plan.path], plan.header, 0)
        yield files
    finally:
        for descriptor in files.values():
            os.close(descriptor)


def _write(checkpoint: Checkpoint, delta: Delta, way: Expander, job: _Job, meter: Meter) -> str:
    """Write one piece; returns the digest of a merged target, else nothing."""
    piece = job.piece
    if piece.kind == "merge":
        return _write_target(checkpoint, delta, way, job, meter)
    if piece.kind == "extra":
        pwrite(job.descriptor, delta.extras[piece.name].data.data, piece.begin)
        meter.add(piece.nbytes)
    else:
        _copy(job, meter)
    return ""


def _write_target(
    checkpoint: Checkpoint, delta: Delta, way: Expander, job: _Job, meter: Meter
) -> str:
    target = delta.target(job.piece.name)
    state = identity.tensor_hash(target.name, target.dtype, target.shape)
    position = job.piece.begin
    for part in way.merged(delta, target, checkpoint.data(target.name)):
        pwrite(job.descriptor, part.data, position)
        state.update(part.data)
        position += part.nbytes
        meter.add(part.nbytes)
    return "sha256:" + state.hexdigest()


def _copy(job: _Job, meter: Meter) -> None:
    """A run of untouched bytes, from file to file without passing through here."""
    piece = job.piece
    source = os.open(job.plan.source, os.O_RDONLY)
    try:
        done = 0
        while done < piece.nbytes:
            count = min(COPY, piece.nbytes - done)
            done += copy_range(
                source, job.descriptor, count, piece.source + done, piece.begin + done
            )
            meter.add(0)
        meter.add(piece.nbytes)
    finally:
        os.close(source)


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
