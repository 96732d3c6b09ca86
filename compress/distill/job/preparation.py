"""Prepare a job: open both models, compare them, and choose how the change travels."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kilodelta.compress.distill.changes.compare import compare
from kilodelta.compress.distill.changes.configuration import difference
from kilodelta.compress.distill.changes.patterns import patterns_for
from kilodelta.compress.distill.changes.split import Split, Wishes, split
from kilodelta.compress.distill.changes.structure import Structure
from kilodelta.compress.distill.job.choice import choose_method
from kilodelta.compress.distill.job.job import Job
from kilodelta.compress.distill.job.warnings import warnings_for
from kilodelta.compress.distill.options import Options
from kilodelta.compress.distill.pair import Pair, open_pair, require_own_memory, untie
from kilodelta.compress.training.products.rounded import INT8
from kilodelta.errors import InputError
from kilodelta.format.targets import Patterns, Target, select
from kilodelta.grid.model import QuantisedModel
from kilodelta.models.weights import fill


def prepare(
    base: Path,
    tuned: Path,
    out: Path,
    options: Options,
    *,
    learns: bool,
    quantised: QuantisedModel | None = None,
    sharded: bool = False,
) -> Job:
    """Open both models, compare them, and choose how the change travels.

    Args:
        base: the base model's files.
        tuned: the tuned model's files.
        out: the file to write.
        options: how the user wants it.
        learns: whether there are inputs to learn from.
        quantised: the base as it is stored, of which `base` holds the values as floats.
        sharded: whether the weights are to be divided among processes.

    Raises:
        BaseMismatchError: the two models do not belong together.
        CheckpointError: files are missing or damaged.
        InputError: the options leave nothing to do, or the models cannot be opened.
    """
    pair = open_pair(
        base,
        tuned,
        model=options.model,
        learns=learns,
        device=options.device if learns else "cpu",
        dtype=options.dtype if learns else "fp32",
        sharded=sharded,
    )
    if options.precisions and len(pair.placement.products) > 1:
        # A base's values on a grid are rounded already; rounding them once more was not measured.
        products = tuple(name for name in pair.placement.products if name != INT8)
        pair = replace(pair, placement=replace(pair.placement, products=products))
    changes = compare(pair.base, pair.tuned, pair.repeats)
    structure = pair.structure if learns else _without_places(pair.structure)
    parts = split(
        changes,
        Wishes(targets=options.targets, exclude=options.exclude, extras=options.extras),
        structure,
        names={*pair.base.names, *pair.tuned.names},
        ties=pair.ties,
    )
    if learns:
        _ready(pair, parts)
    patterns = _patterns(pair, parts)
    targets = select((pair.base.info(name) for name in pair.base.names), patterns)
    config, oversized = _configuration(pair, parts, options)
    if quantised is not None:
        _check_grid(quantised, targets, parts)
    choice = choose_method(
        pair.base, targets, patterns, parts, config, options, quantised=quantised
    )
    return Job(
        pair=pair,
        out=out,
        options=options,
        changes=changes,
        split=parts,
        targets=targets,
        patterns=patterns,
        method=choice.method,
        bits=choice.bits,
        config=config,
        warnings=tuple(warnings_for(pair, changes, parts, oversized)),
        quantised=quantised,
        precisions=options.precisions,
    )


def _check_grid(model: QuantisedModel, targets: tuple[Target, ...], parts: Split) -> None:
    """Check that what is to change in quantised weights are codes.

    Raises:
        InputError: an extra would replace a quantised weight, or is new where a file is changed in
            place; no target is quantised, or one is stored the other way round than its layer.
    """
    for change in parts.extras:
        if change.name in model.stored:
            raise InputError(
                f"{change.name} is stored as codes, so it cannot be stored whole beside them",
                fix="leave it to the coefficients (--targets), or out of --extras",
            )
        if model.method == "gguf" and change.is_new:
            raise InputError(
                f"{change.name} is new, and a GGUF file is only changed in place",
                fix="leave it out: --extras none, or --exclude",
            )
    codes = [target for target in targets if target.name in model.stored]
    if not codes:
        raise InputError(
            f"none of the {len(targets)} tensors to change is quantised in {model.path}",
            fix="choose quantised weights with --targets, or compress against the float model",
        )
    for target in codes:
        if target.transposed:
            raise InputError(
                f"{target.name} is quantised, and its layer has it transposed (a Conv1D)",
                fix="exclude it",
            )


def _without_places(structure: Structure) -> Structure:
    """Return the structure without places in a module, which a fit to the weights does not need."""
    return replace(structure, placed=None)


def _ready(pair: Pair, parts: Split) -> None:
    """Make the student the base with all that only the tuned model has, and nothing random.

    Raises:
        InputError: a tensor that the model needs would be missing from the result, or tied
            tensors cannot be told apart.
    """
    student, teacher = pair.student, pair.teacher
    assert student is not None  # a pair that learns has both
    assert teacher is not None
    require_own_memory(pair, [change.name for change in parts.targets])
    absent = {state for state in student.missing if state not in teacher.missing}
    for change in parts.dropped:
        if change.is_new and pair.names.get(change.name) in absent:
            raise InputError(
                f"{change.name} is new and is not to be stored, so the result would compute with"
                " random values in its place",
                fix="store it with --extras auto, or give no inputs and fit the weights",
            )
    new = [change.name for change in parts.extras if change.is_new and change.name in pair.names]
    untie(student.module, [pair.names[name] for name in new if name in pair.repeats])
    fill(student.module, pair.tuned, {name: pair.names[name] for name in new})
    ours, theirs = student.module.state_dict(), teacher.module.state_dict()
    with torch.no_grad():
        for state in teacher.missing:  # in neither file: random, so it must be the same in both
            ours[state].copy_(theirs[state])


def _patterns(pair: Pair, parts: Split) -> Patterns:
    infos = [pair.base.info(name) for name in pair.base.names]
    matrices = [target.name for target in select(infos, Patterns(include=("*",)))]
    chosen = [change.name for change in parts.targets]
    others = {*matrices, *pair.structure.aliases, *pair.repeats} - set(chosen)
    return Patterns(
        include=patterns_for(chosen, sorted(others)),
        transposed=_globs_of(chosen, pair.structure.transposed),
        stacked=_globs_of(chosen, pair.structure.stacked),
    )


def _globs_of(chosen: Sequence[str], marked: Collection[str]) -> tuple[str, ...]:
    """Return globs that match those of the chosen names that are marked, and no other of them."""
    ours = [name for name in chosen if name in marked]
    return patterns_for(ours, [name for name in chosen if name not in marked]) if ours else ()


def _configuration(
    pair: Pair, parts: Split, options: Options
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return what changed in the configuration; a tied matrix that is torn apart is untied."""
    if options.model is not None:
        return {}, ()
    config, oversized = difference(pair.base, pair.tuned)
    torn = any(change.name in pair.repeats for change in parts.extras) or any(
        change.name in pair.ties for change in parts.targets
    )
    return {**config, "tie_word_embeddings": False} if torn else config, oversized
