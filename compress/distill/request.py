"""Check what a compression is given, before any model is opened: models, inputs, place."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kilodelta.compress.distill.foreign import refuse_foreign
from kilodelta.compress.distill.learn import state as states
from kilodelta.compress.distill.learn import tune
from kilodelta.compress.distill.learn.chat_rows import check_answers
from kilodelta.compress.distill.learn.data import check_count
from kilodelta.compress.distill.options import Options
from kilodelta.compress.distill.place import check_place
from kilodelta.compress.distill.precisions.wishes import parse_for
from kilodelta.errors import InputError, OutputError
from kilodelta.models import locate, open_source, read_texts
from kilodelta.models.inputs.sources import ChatSource, Source


def as_given(options: Options) -> Options:
    """Return options with tuples: one glob, or one text of precisions, may stand for several."""
    asked = options.precisions
    precisions = parse_for(asked) if isinstance(asked, str) else tuple(asked)
    fields = {"targets": options.targets, "exclude": options.exclude}
    globs: dict[str, Any] = {k: (v,) if isinstance(v, str) else tuple(v) for k, v in fields.items()}
    return replace(options, precisions=precisions, **globs)


def find_models(base: str | Path, tuned: str | Path) -> dict[str, Path]:
    """Find both models' files, by what each is called.

    Raises:
        CheckpointError: what was given is of a kind that cannot be compressed.
    """
    models = {"the base": locate(base), "the tuned model": locate(tuned)}
    refuse_foreign(models["the base"], "BASE")
    refuse_foreign(models["the tuned model"], "TUNED")
    return models


def check_outputs(
    out: Path,
    models: Mapping[str, Path],
    *,
    force: bool,
    resume: bool,
    learns: bool,
    tunes: bool = False,
) -> None:
    """Check that the result may be written, and that a run towards it is gone on with or forgotten.

    Args:
        out: the file to write.
        models: by what each is called, the models that are read.
        force: whether `out` and an interrupted run towards it may be replaced.
        resume: whether the interrupted run goes on.
        learns: whether there are inputs to learn from.
        tunes: whether a search for a rate comes first. One that was interrupted in its first trial
            has left nothing, and goes on from there.

    Raises:
        InputError: a run without inputs is to be resumed, or one that left no state.
        OutputError: `out` cannot be written, exists, or has an interrupted run.
    """
    check_place(out, models, force=force, resume=resume)
    kept = states.place_of(out)
    if resume and not learns:
        raise InputError("only a run with inputs can be resumed", fix="give its --inputs")
    if resume and not tunes:
        states.require(kept)
    for left in (kept, tune.place_of(out)):
        if left.exists() and not resume and not force:
            raise OutputError(
                f"{left} holds an interrupted run",
                fix="go on with it by --resume, or begin anew by --force",
            )


def check_cache(options: Options, models: Mapping[str, Path]) -> None:
    """Check that the tuned model's outputs may be kept where the user wants them.

    Args:
        options: name the folder, or none.
        models: by what each is called, the models that are read.

    Raises:
        OutputError: it is a file, lies in one, or is a model's own folder.
    """
    if options.teacher_cache is None:
        return
    cache, fix = Path(options.teacher_cache), "give another folder with --teacher-cache"
    if not options.teacher_cache:
        raise OutputError("--teacher-cache names no folder", fix=fix)
    present = next(p for p in (cache, *cache.absolute().parents) if os.path.lexists(p))
    if not present.is_dir():
        raise OutputError(f"{present} is no folder, so no teacher cache can lie there", fix=fix)
    for what, path in models.items():
        if path.is_dir() and cache.is_dir() and os.path.samefile(cache, path):
            raise OutputError(f"{cache} is {what}, which is read and never written", fix=fix)


def open_inputs(
    inputs: str | Path | None, options: Options
) -> tuple[Source | None, tuple[str, ...] | None]:
    """Read and judge the inputs and the labels, before any model is opened.

    Raises:
        InputError: they cannot be read, or are too few; or there is one label only.
    """
    if inputs is None:
        return None, None
    source = open_source(inputs, field=options.field, limit=options.limit)
    if isinstance(source, ChatSource) and options.loss_on == "assistant":
        check_answers(source)
    if source.rows is not None:
        check_count(source.rows, source.spec, options.held_out, options.batch)
    return source, None if options.labels is None else _read_labels(options.labels)


def _read_labels(path: str) -> tuple[str, ...]:
    labels = tuple(read_texts(path))
    if len(set(labels)) < 2:
        raise InputError(
            f"{path} holds one label, which every input is nearest to",
            fix="give two labels or more, one per line",
        )
    return labels
