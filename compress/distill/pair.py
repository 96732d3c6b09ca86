"""The two models side by side: the base in the tuned model's architecture, and the tuned model.

Files name tensors as they like (a head puts a prefix before the encoder's names), store tied
tensors once, twice or under another name, and leave out what they share. Here all of that ends:
both models are seen under the base's names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kilodelta.compress.distill.changes.compare import equal_tensors
from kilodelta.compress.distill.changes.structure import Structure, by_names, from_module
from kilodelta.compress.distill.placement import (
    Placement,
    choose_placement,
    require_weights_fit,
)
from kilodelta.errors import CheckpointError, InputError, KiloDeltaError
from kilodelta.files.checkpoint import Checkpoint, read_config
from kilodelta.files.dtypes import TARGETS
from kilodelta.models import LoadedModel, open_model

CPU = torch.device("cpu")
ON_CPU = Placement(device=CPU, dtype=torch.float32)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two models under the base's names.

    Attributes:
        base: the base's files.
        tuned: the tuned model's files, their tensors under the base's names; what the files leave
            out because it is tied is there under its own name as well.
        structure: what the base's tensors are.
        repeats: names that only `tuned` has, with the name that the base's model ties them to.
        ties: for each tied matrix that both store under several names: all its names.
        student: the base's weights in the tuned model's architecture; None where no module is
            needed and none could be built.
        teacher: the tuned model; None likewise. Where both models' files hold the same names and
            shapes it shares the student's module, which `teacher.swap` fills in turn.
        names: checkpoint name to state name, of both models' tensors.
        note: why there is no module; empty where there is one.
        placement: where both are to compute, and in which types.
    """

    base: Checkpoint
    tuned: Checkpoint
    structure: Structure
    repeats: Mapping[str, str]
    ties: Mapping[str, tuple[str, ...]]
    student: LoadedModel | None = None
    teacher: LoadedModel | None = None
    names: Mapping[str, str]
    note: str = ""
    placement: Placement = ON_CPU


def open_pair(
    base: Path,
    tuned: Path,
    *,
    model: str | None,
    learns: bool,
    device: str = "auto",
    dtype: str = "auto",
    sharded: bool = False,
) -> Pair:
    """Open both models, once.

    Args:
        base: the base's files.
        tuned: the tuned model's files.
        model: `package.module:function` that builds the module, where the files do not say.
        learns: whether the models have to compute. Where they need not, an architecture that
            cannot be opened is no obstacle: the tensors' names say what they are.
        device: where they compute, as `choose_placement` takes it.
        dtype: of their weights in memory, likewise.
        sharded: whether `processes.shards` is to bring them to the device; they stay mapped.

    Raises:
        CheckpointError: files are missing or damaged.
        InputError: the models cannot be opened, or do not fit into memory, and have to compute.
    """
    before, after = Checkpoint.open(base), Checkpoint.open(tuned)
    source = model or str(_architecture(base, tuned))
    placement = choose_placement(device, dtype, before)
    opened = replace(placement, device=CPU) if sharded else placement
    if learns:
        require_weights_fit(before, opened)
    try:
        student = _open(source, before, opened)
        alike = _are_laid_out_alike(before, after)
        teacher = student if alike else _open(source, after, opened)
    except KiloDeltaError as problem:
        if learns or model is not None or _is_quantised(before) or _is_quantised(after):
            raise
        return _by_names(before, after, problem.what)
    pair = _by_modules(before, after, student, teacher)
    return replace(pair, placement=placement)


def _open(source: str, weights: Checkpoint, placement: Placement) -> LoadedModel:
    loaded = open_model(source, weights=weights, dtype=placement.dtype, mapped=True)
    loaded.module.to(placement.device)
    return loaded


def _are_laid_out_alike(base: Checkpoint, tuned: Checkpoint) -> bool:
    """Return whether opening either model makes the same module with the same places.

    Opening depends on the tensors' names, shapes, and kinds of numbers; float types are all loaded
    as one.
    """

    def kinds(checkpoint: Checkpoint) -> list[tuple[str, tuple[int, ...], str]]:
        infos = map(checkpoint.info, checkpoint.names)
        return [
            (i.name, i.shape, "float" if i.dtype in TARGETS | {"F64"} else i.dtype) for i in infos
        ]

    return kinds(base) == kinds(tuned)


def _architecture(base: Path, tuned: Path) -> Path:
    """Whose `config.json` builds the module: the tuned model's, or the base's where it has none."""
    bare = tuned.is_file() or not (tuned / "config.json").is_file()
    return base if bare and (base / "config.json").is_file() else tuned


def _is_quantised(checkpoint: Checkpoint) -> bool:
    return "quantization_config" in read_config(checkpoint)


def _by_names(base: Checkpoint, tuned: Checkpoint, note: str) -> Pair:
    tuned = tuned.renamed(_prefixes(base.names, tuned.names))
    twins = equal_tensors(base, base.names)
    left_out = {
        name: next(other for other in twins[name] if other in tuned)
        for name in base.names
        if name not in tuned and any(other in tuned for other in twins.get(name, ()))
    }
    tuned = tuned.with_copies(left_out)
    own = equal_tensors(tuned, tuned.names)
    repeats = {
        name: next(other for other in own[name] if other in base)
        for name in tuned.names
        if name not in base and any(other in base for other in own.get(name, ()))
    }
    return Pair(
        base=base,
        tuned=tuned,
        structure=by_names(base),
        repeats=repeats,
        ties=_tied_in_both(base, tuned),
        names={},
        note=note,
    )


def _prefixes(base: Iterable[str], tuned: Iterable[str]) -> dict[str, str]:
    """Tuned names to base names where one of the two puts a prefix before the other's."""
    ours, theirs = set(base), set(tuned)
    if 2 * len(ours & theirs) >= len(ours):
        return {}
    more = Counter(front for name in theirs for front, rest in _fronts(name) if rest in ours)
    less = Counter(front for name in ours for front, rest in _fronts(name) if rest in theirs)
    best = max(more.values(), default=0), max(less.values(), default=0)
    if max(best) <= len(ours & theirs):
        return {}
    if best[0] >= best[1]:
        front = more.most_common(1)[0][0]
        return {front + name: name for name in ours if front + name in theirs}
    front = less.most_common(1)[0][0]
    return {name: front + name for name in theirs if front + name in ours}


def _fronts(name: str) -> Iterable[tuple[str, str]]:
    parts = name.split(".")
    return [(".".join(parts[:n]) + ".", ".".join(parts[n:])) for n in range(1, len(parts))]


def _by_modules(
    base: Checkpoint, tuned: Checkpoint, student: LoadedModel, teacher: LoadedModel
) -> Pair:
    stored = {state: name for name, state in student.names.items()}
    renamed = {name: stored.get(state, name) for name, state in teacher.names.items()}
    tuned = tuned.renamed(renamed)
    names = {**{renamed[n]: state for n, state in teacher.names.items()}, **student.names}
    tuned = tuned.with_copies(_left_out(base, tuned, teacher, names))
    _check_whole(base, tuned, teacher, names)
    return Pair(
        base=base,
        tuned=tuned,
        structure=from_module(student, names),
        repeats=_repeats(base, tuned, student, names),
        ties=_tied_in_both(base, tuned),
        student=student,
        teacher=teacher,
        names=names,
    )


def _left_out(
    base: Checkpoint, tuned: Checkpoint, teacher: LoadedModel, names: Mapping[str, str]
) -> dict[str, str]:
    """Tensors of the base that the tuned files leave out, because the tuned model ties them: each
    with the name of the tensor that it computes with."""
    state = teacher.module.state_dict()
    by_place = {_place(state[names[name]]): name for name in tuned.names if name in names}
    found = {}
    for name in base.names:
        place = _place(state[names[name]]) if name in names and name not in tuned else None
        if place is not None and place in by_place:
            found[name] = by_place[place]
    return found


def _repeats(
    base: Checkpoint, tuned: Checkpoint, student: LoadedModel, names: Mapping[str, str]
) -> dict[str, str]:
    """Map names that only the tuned files have to those that the base's model ties them to."""
    state = student.module.state_dict()
    by_place = {_place(state[names[name]]): name for name in base.names if name in names}
    found = {}
    for name in tuned.names:
        place = _place(state[names[name]]) if name in names and name not in base else None
        if place is not None and place in by_place:
            found[name] = by_place[place]
    return found


def _place(values: torch.Tensor) -> tuple[Any, ...] | None:
    """Return where a tensor's data lie; None for an empty one."""
    return (values.data_ptr(), tuple(values.shape), values.stride()) if values.numel() else None


def _check_whole(
    base: Checkpoint, tuned: Checkpoint, teacher: LoadedModel, names: Mapping[str, str]
) -> None:
    """Refuse a tuned model that lacks a tensor which the base has and the module needs: it would
    be compared with random values."""
    absent = set(teacher.missing)
    lacking = [n for n in base.names if n in names and names[n] in absent and n not in tuned]
    if lacking:
        raise CheckpointError(
            f"{tuned.path} lacks {lacking[0]}, which the base has and the model needs",
            fix="give the whole fine-tuned model; an adapter comes in by kilodelta import",
        )


def _tied_in_both(base: Checkpoint, tuned: Checkpoint) -> dict[str, tuple[str, ...]]:
    """Matrices that are equal under the same names in both models."""
    found: dict[str, tuple[str, ...]] = {}
    for name, group in equal_tensors(base, base.names).items():
        present = [n for n in group if n in tuned]
        same = equal_tensors(tuned, present).get(name, ()) if name in tuned else ()
        if len(same) > 1:
            found[name] = same
    return found


def untie(module: nn.Module, states: Iterable[str]) -> None:
    """Give parameters that share memory with others memory of their own."""
    for name in states:
        path, _, attribute = name.rpartition(".")
        owner = module.get_submodule(path)
        parameter: Any = owner._parameters[attribute]
        copy = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        owner._parameters[attribute] = copy


def require_own_memory(pair: Pair, chosen: Iterable[str]) -> None:
    """Refuse targets that the base stores twice and a module ties by its own code.

    Raises:
        InputError: such a module can hold one update only, the files need two.
    """
    if pair.student is None:
        return
    state = pair.student.module.state_dict()
    places: dict[Any, str] = {}
    for name in chosen:
        other = places.setdefault(_place(state[pair.names[name]]), name)
        if other != name:
            raise InputError(
                f"{other} and {name} are one parameter of the module, and the base stores both",
                fix=f"save the base without {name}, or leave both alone with --exclude",
            )
