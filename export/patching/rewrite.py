"""Write the ONNX file of a fine-tune from that of its base, without torch or onnx.

The file is copied by the kernel, which shares the blocks where the file system can, and only the
changed weights are written. The names appear once the result's digest has come out right.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from kilodelta.errors import InputError, OutputError
from kilodelta.exact.selftest import require_good_kernels
from kilodelta.export.merge.tensor import changed_names
from kilodelta.export.patching.map import FilePlace, PatchMap
from kilodelta.export.patching.plan import Bytes, PatchPlan, make_plan
from kilodelta.export.patching.promised import (
    digest_of,
    opened,
    require_promised,
    write_promised,
)
from kilodelta.export.patching.run import run
from kilodelta.export.patching.strided import write_place
from kilodelta.files import staging
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.copying import copy_range
from kilodelta.format.delta import Delta
from kilodelta.format.file import load
from kilodelta.merging.quantised import MIN_CHANGED
from kilodelta.progress import Progress, silent

COPY = 16 << 20
"""Bytes copied at a time; in memory only where the kernel cannot copy by itself."""


@dataclass(frozen=True, kw_only=True)
class Patched:
    """What a patch wrote: the files, the model first; the proved root; and counts."""

    files: tuple[Path, ...]
    result: str
    targets: int
    extras: int
    written: int
    """Bytes written anew; all others are the base file's."""

    unused: tuple[str, ...]
    """Changed tensors that the model's outputs do not depend on."""


def patch(
    model: str | os.PathLike[str],
    delta: str | os.PathLike[str] | Delta,
    out: str | os.PathLike[str],
    *,
    places: PatchMap,
    base: str | Path | Checkpoint | None = None,
    promised: str | None = None,
    min_changed: float = MIN_CHANGED,
    threads: int | None = None,
    progress: Progress = silent,
) -> Patched:
    """Write the fine-tuned model's ONNX file; external data go beside it under their own names.

    An engine is written in the same way, from the map of the base's engine.

    Args:
        model: the base's ONNX file or engine.
        delta: a `.kd` file or a `Delta`.
        out: a new path. Where `model` has external data, one in another folder.
        places: the map of `model`.
        base: the base checkpoint, or `write_rest`'s part of it, for what the file does not hold.
        promised: `sha256:<hex>` that the written file must have, where somebody has built it.
        min_changed: the share of a quantised base's codes that has to change.
        threads: cores to use; all by default.
        progress: called with the bytes done.

    Raises:
        BaseMismatchError: `model` holds another base than the delta's; nothing is written.
        CheckpointError: `model` is not the file that the map was made for.
        ExportError: a changed tensor was fused, merged or folded, or `base` is needed.
        ProofError: the result's digest is not the file's, or the written file's is not `promised`;
            nothing is left behind.
        QualityError: fewer codes change.
        OutputError: `out` exists or cannot be written.
    """
    require_good_kernels()
    opened = delta if isinstance(delta, Delta) else load(delta)
    plan = make_plan(Path(model), opened, places, base)
    whole = promised is not None and len(places.files) == 1
    with _copies(plan, Path(out), empty=whole) as (files, paths):
        main = files[places.files[0].file]
        if promised is not None and whole:
            write_promised(
                plan,
                main,
                promised,
                min_changed=min_changed,
                threads=threads,
                progress=progress,
            )
        else:

            def write(place: FilePlace, data: Bytes) -> None:
                write_place(files[place.file], place, data)

            run(plan, write, min_changed=min_changed, threads=threads, progress=progress)
            if promised is not None:
                require_promised(plan, digest_of(main), promised)
    return Patched(
        files=paths,
        result=plan.delta.manifest.result,
        targets=len(plan.delta.targets),
        extras=len(plan.delta.extras),
        written=sum(
            place.nbytes for name in changed_names(plan.delta) for place in plan.places(name)
        ),
        unused=tuple(name for name in changed_names(plan.delta) if not plan.places(name)),
    )


@contextmanager
def _copies(
    plan: PatchPlan, out: Path, *, empty: bool
) -> Iterator[tuple[Mapping[str, int], tuple[Path, ...]]]:
    """Yield descriptors of copies by file name, and the paths they get when the block ends well.

    With `empty` the files are new ones, and the block fills them.

    The model's own name appears last, so that it never stands without its data.
    """
    main, *others = (file.file for file in plan.patch_map.files)
    paths = {main: out, **{name: out.parent / name for name in others}}
    _require_free(plan, paths.values(), alone=not others)
    with ExitStack() as stack:
        stages = {
            name: stack.enter_context(staging.new_file(path, parents=True))
            for name, path in paths.items()
        }
        with ExitStack() as opened:
            files = {}
            for name, stage in stages.items():
                files[name] = os.open(stage, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
                opened.callback(os.close, files[name])
                if not empty:
                    _copy(plan.path(name), files[name])
            yield files, tuple(paths.values())


def _require_free(plan: PatchPlan, paths: Iterable[Path], *, alone: bool) -> None:
    taken = next((path for path in paths if path.exists()), None)
    if taken is not None and not alone and taken.parent.resolve() == plan.model.parent.resolve():
        raise InputError(
            f"{plan.model} keeps weights in {taken.name}, and the tuned model's have that name too",
            fix="give a path in another folder",
        )
    if taken is not None:
        raise OutputError(f"{taken} exists already", fix="give a new name, or remove this file")


def _copy(source: Path, target: int) -> None:
    with opened(source) as descriptor:
        done = 0
        while copied := copy_range(descriptor, target, COPY, done, done):
            done += copied
