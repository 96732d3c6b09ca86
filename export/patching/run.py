"""Run a plan: check the base's files, compute the changed weights, hand them on and prove them.

Where the bytes go, into a new file or a running session, is the caller's affair.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from kilodelta import parallel
from kilodelta.errors import CheckpointError
from kilodelta.export.manifest.facts import FileFact
from kilodelta.export.merge.tensor import changed_names, require_result
from kilodelta.export.patching.map import FilePlace
from kilodelta.export.patching.placing import Memory, PlacedBytes, fresh
from kilodelta.export.patching.plan import Bytes, PatchPlan
from kilodelta.files import plain
from kilodelta.files.identity import tensor_hash
from kilodelta.merging.quantised import MIN_CHANGED
from kilodelta.progress import Meter, Progress

CHUNK = 1 << 20
"""Bytes hashed at a time."""


def run(
    plan: PatchPlan,
    write: Callable[[FilePlace, Bytes], None],
    *,
    min_changed: float = MIN_CHANGED,
    threads: int | None,
    progress: Progress,
) -> None:
    """Call `write` with the tuned bytes of every place, from several threads, and prove them.

    Nothing that was written may be used before this returns.

    Args:
        plan: what changes where.
        write: takes a place and its bytes, uint8 (n,); has to be thread-safe.
        min_changed: the share of a quantised base's codes that has to change.
        threads: cores to use; all by default.
        progress: called with how far the work is, in bytes.

    Raises:
        QualityError: fewer codes change.
        CheckpointError: a file is not the one that the map was made for.
        ExportError: a value does not fit into the file's dtype.
        ProofError: the tuned weights are not the ones that the delta promises.
    """
    # These load the kernels, which a device that only looks at a folder does without.
    from kilodelta.export.merge.in_grid import Tally, at_once
    from kilodelta.export.patching.codes.rewrite import ALMOST_NOTHING, place_codes

    jobs: list[FileFact | str] = [*plan.patch_map.files, *changed_names(plan.delta)]
    meter = Meter("patch", sum(_weight(plan, job) for job in jobs), "B", progress)
    digests: dict[str, str] = {}
    tally = Tally()

    def work(job: FileFact | str) -> None:
        if isinstance(job, FileFact):
            _check(plan.path(job.file), job, meter)
            return
        if job in plan.patch_map.codes:
            digests[job] = place_codes(plan, job, write, tally)
            meter.add(plan.size(job))
            return
        info = plan.tuned_info(job)
        state = tensor_hash(job, info.dtype, info.shape)

        def look(part: Bytes) -> None:
            state.update(part.data)

        place_tensor(plan, job, write, look if job in plan.delta.tensors else None)
        digests[job] = f"sha256:{state.hexdigest()}"
        meter.add(plan.size(job))

    if plan.delta.grid_targets:
        threads = at_once([plan.size(name) for name in plan.delta.grid_targets], threads)
    parallel.run(work, jobs, meter, weight=lambda job: _weight(plan, job), threads=threads)
    require_result(plan.delta, digests)
    tally.require(min_changed, ALMOST_NOTHING)


def place_tensor(
    plan: PatchPlan,
    name: str,
    write: Callable[[FilePlace, Bytes], None],
    look: Callable[[Bytes], object] | None = None,
    memory: Memory = fresh,
) -> None:
    """Compute a changed tensor and call `write` with its bytes for each place.

    Args:
        plan: what changes where.
        name: the tensor's.
        write: takes a place and its bytes, uint8 (n,).
        look: called with the tensor's own bytes in order, piece by piece.
        memory: gives the memory of what `write` takes.

    Raises:
        CheckpointError: the base tensor cannot be read.
        ExportError: a value does not fit into the file's dtype.
    """
    placed = PlacedBytes(plan.tuned_info(name), plan.places(name), memory)
    for part in plan.parts(name):
        if look is not None:
            look(part)
        placed.add(part)
    for place, data in placed.finished():
        write(place, data)


def _weight(plan: PatchPlan, job: FileFact | str) -> int:
    return job.nbytes if isinstance(job, FileFact) else plan.size(job)


def _check(path: Path, fact: FileFact, meter: Meter) -> None:
    state = hashlib.sha256()
    try:
        with plain.open_reader(path, follow=True) as file:
            while part := file.read(CHUNK):
                state.update(part)
                meter.add(len(part))
    except OSError as problem:
        raise CheckpointError(
            f"{path} cannot be read: {problem.strerror or problem}",
            fix="give the ONNX file that the map was made for, with its external data beside it",
        ) from None
    if f"sha256:{state.hexdigest()}" != fact.sha256:
        raise CheckpointError(
            f"{path} is sha256:{state.hexdigest()}, its map was made for {fact.sha256}",
            fix="fetch the file again, or make its map again",
        )
