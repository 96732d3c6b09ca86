"""Merge a base and a delta into new files, proved while they are written.

The output takes its name only after the copied tensors have come out as the base's and the merged
ones as the delta promises.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from kilodelta.errors import BaseMismatchError, InputError, OutputError
from kilodelta.exact.selftest import require_good_kernels
from kilodelta.export.merge.config import read_given, write_config
from kilodelta.export.merge.gguf_file import write_gguf
from kilodelta.export.merge.in_grid import (
    GridStream,
    Tally,
    grid_stream,
    threads_for,
    with_codes,
)
from kilodelta.export.merge.onnx_file import require_grid_only, staged, write_onnx
from kilodelta.export.merge.plan import FilePlan, merged_index, plan_files
from kilodelta.export.merge.room import merged_need
from kilodelta.export.merge.streaming import MergeStream
from kilodelta.files import staging
from kilodelta.files.baseline import require_base
from kilodelta.files.checkpoint import INDEX, Checkpoint
from kilodelta.files.staging.sidecars import copy_sidecars
from kilodelta.format.delta import Delta
from kilodelta.format.file import load
from kilodelta.grid.model import QuantisedModel
from kilodelta.grid.onnx_source import OnnxSource
from kilodelta.merging.devices import Merge, merger
from kilodelta.merging.in_grid import MIN_CHANGED
from kilodelta.merging.quantised import open_base, refuse_quantised, require_grid_base
from kilodelta.models.hub import locate, locate_delta
from kilodelta.progress import Progress, silent
from kilodelta.rehearsal import begin_work

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What a merge wrote: its place, the proved root over the targets, and counts of tensors."""

    path: Path
    result: str
    targets: int
    extras: int
    copied: int
    nbytes: int
    """Bytes of the weights' files."""

    config: str
    """Where config.json comes from: `base`, `delta` or `given`; empty where there is none."""

    left_out: Mapping[str, str]
    """What of the base's folder was not copied, and why."""

    new: tuple[str, ...]
    """Extras that the base lacks or holds in another shape."""

    codes: int = 0
    """Codes of a quantised base that could change; 0 of a float one."""

    codes_changed: int = 0
    """How many did."""

    still: int = 0
    """How many lie in blocks with a step of zero, which nothing changes."""


def merge(
    base: str | os.PathLike[str] | Checkpoint,
    delta: str | os.PathLike[str] | Delta,
    out: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    device: str = "cpu",
    max_work: float | None = None,
    min_changed: float = MIN_CHANGED,
    progress: Progress = silent,
) -> Merged:
    """Write the fine-tuned model: a `.safetensors` file, or a folder like the base's.

    A quantised base keeps its layout and scales and gets new codes: the merge in the grid.

    Args:
        base: the model the delta was made for.
        delta: a `.kd` file or a `Delta`.
        out: a new path; `.safetensors` for one file (`.gguf` or `.onnx` of such a base), else a
            folder with the base's sharding, configuration and tokenizer.
        config: the tuned model's folder, or its `config.json`; by default the base's with what the
            delta says of it.
        threads: cores to use; all by default.
        device: `cpu`, or `cuda` or `cuda:N` for a GPU, whose memory need not hold the model.
        max_work: the most operations that the file may ask for; by default what suits the base's
            size. A `Delta` has its own limit.
        min_changed: the share of a quantised base's codes that has to change.
        progress: called with how far the work is, in bytes.

    Raises:
        QualityError: fewer codes change; nothing is left behind.
        BaseMismatchError: `base` is another model, and nothing is written; or it changes meanwhile.
        FileError: the file is damaged, or asks for more work than allowed.
        CheckpointError: the base cannot be read, is cut meanwhile, or a target holds NaN.
        ProofError: the result's digest is not the file's; nothing is left behind.
        OutputError: `out` exists or cannot be written.
        InputError: there is no such device or configuration, or `min_changed` of a float base.
        SelfTestError: the CPU or the device computes wrongly.

    Example:
        >>> import tempfile
        >>> golden = Path("tests/golden/0.1.0")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     out = Path(folder, "merged.safetensors")
        ...     done = merge(golden / "base.safetensors", golden / "nola-8.kd", out)
        >>> done.targets, done.copied
        (4, 0)
    """
    require_good_kernels()
    merge_target, at_once = merger(device)
    place = Path(out)
    opened = delta if isinstance(delta, Delta) else load(locate_delta(delta), max_work=max_work)
    if not isinstance(base, Checkpoint):
        base = locate(os.fspath(base))
    if opened.manifest.grid is not None:
        model = open_base(base, opened.manifest)
        if not isinstance(model.source, Checkpoint):
            _require_like(model.path, config, place)
            return _merge_one_file(model, opened, place, min_changed, threads, progress)
    else:
        model = None
        if min_changed not in (0, MIN_CHANGED):  # 0 takes any result, also a float base's
            raise InputError(
                f"--min-changed {min_changed:g} is a share of codes, and a float base has none",
                fix="leave --min-changed out",
            )
    checkpoint = Checkpoint.open(base)
    single = place.suffix == ".safetensors"
    _require_place(checkpoint, place, single)
    given = None if config is None else _read_config(Path(config), single)
    staging.require_room(merged_need(place, checkpoint, opened))
    # Remembered digests suffice: each byte is hashed on its way, against these or the result.
    bound, stream = _stream(checkpoint, opened, model, merge_target, threads, progress)
    if not single:
        staging.require_free(place)
    _begin(place, bound, stream.identity.root, device)
    log.info(
        "merge %d tensors, by %s, into %s on %s",
        len(bound.tensors),
        opened.form.name,
        checkpoint.path,
        device,
    )
    with staging.new_file(place, replace=False) if single else staging.new_folder(place) as stage:
        plans = plan_files(checkpoint, bound, stage, single=single)
        if isinstance(stream, GridStream):
            plans = with_codes(plans, stream)
            stream.write(plans, threads_for(stream, threads), progress)
            stream.tally.require(min_changed)
        else:
            stream.write(plans, threads or at_once, progress)
        source, left_out = "", dict[str, str]()
        if checkpoint.path.is_dir() and not single:
            left_out = _copy_beside(checkpoint, bound, stage)
        if not single:
            source = write_config(stage, checkpoint, bound, given)
    done = _summary(checkpoint, bound, plans, place, source, left_out)
    return _counted(done, stream.tally) if isinstance(stream, GridStream) else done


def _stream(
    checkpoint: Checkpoint,
    opened: Delta,
    model: QuantisedModel | None,
    merge_target: Merge,
    threads: int | None,
    progress: Progress,
) -> tuple[Delta, MergeStream]:
    """Prove the base and bind the delta to it; a quantised base has a stream of codes."""
    if model is not None:
        stored = require_grid_base(
            model, opened.manifest, cached=True, threads=threads, progress=progress
        )
        bound = opened.bind(model)
        return bound, grid_stream(checkpoint, stored, bound, model, merge_target)
    try:
        identity = require_base(
            checkpoint, opened.manifest.base, cached=True, threads=threads, progress=progress
        )
    except BaseMismatchError:
        refuse_quantised(checkpoint, opened.manifest)
        raise
    bound = opened.bind_to(checkpoint.info(name) for name in checkpoint.names)
    stream = MergeStream(checkpoint=checkpoint, identity=identity, delta=bound, merge=merge_target)
    return bound, stream


def _begin(place: Path, delta: Delta, base: str, device: str) -> None:
    """End the checks: a rehearsal goes no further."""
    what = f"{len(delta.tensors)} tensors, by {delta.form.name}"
    begin_work(place, base=base, targets=what, device=device)


def _merge_one_file(
    model: QuantisedModel,
    opened: Delta,
    place: Path,
    min_changed: float,
    threads: int | None,
    progress: Progress,
) -> Merged:
    """Merge into a copy of a GGUF file or an ONNX graph."""
    staging.require_room(merged_need(place, model, opened))
    stored = require_grid_base(model, opened.manifest, threads=threads, progress=progress)
    bound = opened.bind(model)
    if isinstance(model.source, OnnxSource):
        require_grid_only(bound, model)
    _begin(place, bound, stored.root, "cpu")
    if isinstance(model.source, OnnxSource):
        with staged(place, model.source) as stage:
            tally = write_onnx(model, stored, bound, stage, progress)
            tally.require(min_changed)
    else:
        with staging.new_file(place, replace=False) as stage:
            tally = write_gguf(model, stored, bound, stage, progress)
            tally.require(min_changed)
    done = Merged(
        path=place,
        result=bound.manifest.result,
        targets=len(bound.tensors),
        extras=0,
        copied=len(stored.tensors) - len(bound.tensors),
        nbytes=place.stat().st_size,
        config="",
        left_out={},
        new=(),
    )
    return _counted(done, tally)


def _counted(done: Merged, tally: Tally) -> Merged:
    return replace(done, codes=tally.weights, codes_changed=tally.changed, still=tally.still)


def _require_like(base: Path, config: object, place: Path) -> None:
    """Check the output of a base that is one file with its configuration in it."""
    if config is not None:
        raise InputError(f"{base} takes no config.json", fix="leave --config out")
    if place.suffix != base.suffix:
        raise InputError(
            f"the base is {base.name}, and {place} is to be something else",
            fix=f"give an output that ends in {base.suffix}",
        )
    if place.exists():
        raise OutputError(f"{place} exists already", fix="give a new name, or remove this file")


def _require_place(checkpoint: Checkpoint, place: Path, single: bool) -> None:
    if single and len(checkpoint.shards) > 1:
        raise InputError(
            f"{checkpoint.path} has {len(checkpoint.shards)} shards, {place} is one file",
            fix="give a folder as output",
        )
    if single and place.exists():
        raise OutputError(f"{place} exists already", fix="give a new name, or remove this file")


def _read_config(path: Path, single: bool) -> dict[str, object]:
    if single:
        raise InputError(
            "a configuration has no place beside a single .safetensors file",
            fix="give a folder as output, or leave --config out",
        )
    return read_given(path)


def _copy_beside(checkpoint: Checkpoint, delta: Delta, stage: Path) -> dict[str, str]:
    own = frozenset(shard.path.name for shard in checkpoint.shards) | {INDEX}
    left_out = copy_sidecars(checkpoint.shards[0].path.parent, stage, own)
    if checkpoint.index is not None:
        (stage / INDEX).write_bytes(merged_index(checkpoint, delta))
    return left_out


def _summary(
    checkpoint: Checkpoint,
    delta: Delta,
    plans: list[FilePlan],
    place: Path,
    config: str,
    left_out: Mapping[str, str],
) -> Merged:
    kinds = [piece.kind for plan in plans for piece in plan.pieces]
    return Merged(
        path=place,
        result=delta.manifest.result,
        targets=kinds.count("merge"),
        extras=kinds.count("store"),
        copied=kinds.count("copy"),
        nbytes=sum(plan.size for plan in plans),
        config=config,
        left_out=left_out,
        new=tuple(
            name
            for name, tensor in delta.extras.items()
            if name not in checkpoint or checkpoint.info(name).shape != tensor.shape
        ),
    )
