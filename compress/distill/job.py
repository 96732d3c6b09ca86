"""Everything that is settled before the first step: what changed, what carries it, which method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kilodelta import __version__
from kilodelta.compress.distill import budget as budgets
from kilodelta.compress.distill.changes.compare import Change, compare, energy
from kilodelta.compress.distill.changes.configuration import difference, traces_of_training
from kilodelta.compress.distill.changes.patterns import patterns_for
from kilodelta.compress.distill.changes.split import Split, Wishes, split
from kilodelta.compress.distill.changes.structure import Structure
from kilodelta.compress.distill.options import Options
from kilodelta.compress.distill.pair import Pair, open_pair, require_own_memory, untie
from kilodelta.errors import InputError
from kilodelta.files.checkpoint import Checkpoint, in_name_order
from kilodelta.files.tensor import RawTensor
from kilodelta.format.delta import Delta
from kilodelta.format.manifest import Base, Manifest
from kilodelta.format.methods import Method
from kilodelta.format.packing import Group
from kilodelta.format.quantise import Scale
from kilodelta.format.targets import Patterns, Target, select
from kilodelta.merging.build import FINGERPRINTED
from kilodelta.models.weights import TORCH, fill, values

DEFAULT_BUDGET = 20_000
LOUD = 0.1
"""Share of the change's energy from which it is said loudly that the file does not carry it."""
LONGEST_MADE: Mapping[str, str | int | float | bool] = {
    "tool": f"kilodelta {__version__}",
    "agreement": -0.1234,
    "agreement_counts": "yes-no",
    "base_agreement": -0.1234,
    "distance": 10.12345,
    "held_out": 100000,
    "inputs": "0" * 12,
    "interrupted": True,
    "steps": 100000,
    "weight_error": 10.1234,
}
"""The longest report that a manifest holds."""
HEADS = ("classifier.", "score.", "qa_outputs.", "pre_classifier.", "classification_head.")
"""How tensors of heads begin that fine-tuning adds."""
OFFSETS = 16
"""Bytes that a tensor's shape and place in the file may take beyond those of an empty one."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that is settled before the first step.

    Attributes:
        pair: both models.
        out: the file to write.
        options: how the user wants it.
        changes: what differs.
        split: how each change travels.
        targets: what coefficients change, in file order.
        patterns: the globs that choose exactly these.
        method: what trains, with its size.
        bits: of a coefficient.
        config: what the fine-tune changed in the base's configuration.
        warnings: what a user should hear of.
    """

    pair: Pair
    out: Path
    options: Options
    changes: tuple[Change, ...]
    split: Split
    targets: tuple[Target, ...]
    patterns: Patterns
    method: Method
    bits: int
    config: Mapping[str, Any]
    warnings: tuple[str, ...]

    @property
    def coefficients(self) -> int:
        """How many numbers are trained, beside extras."""
        return sum(group.size for group in _groups(self.method, self.targets))

    @property
    def name(self) -> str:
        """What the manifest calls the base."""
        return self.options.name or self.pair.base.path.name

    @property
    def dropped_share(self) -> float:
        """The share of the change's energy that the file does not carry, 0 to 1."""
        return energy(self.split.dropped) / max(energy(self.changes), 1e-60)

    def stored(self, name: str) -> RawTensor:
        """Return an extra as the tuned model has it, in the type that it is stored in."""
        change = next(change for change in self.split.extras if change.name == name)
        raw = self.pair.tuned.raw(name)
        return raw if raw.dtype == change.dtype else as_dtype(values(raw), change.dtype)


def as_dtype(tensor: torch.Tensor, dtype: str) -> RawTensor:
    """Copy a tensor's values in the type of a safetensors name."""
    return RawTensor.copy_of(tensor.to(TORCH[dtype]))


def prepare(base: Path, tuned: Path, out: Path, options: Options, *, learns: bool) -> Job:
    """Open both models, compare them, and choose how the change travels.

    Args:
        base: the base model's files.
        tuned: the tuned model's files.
        out: the file to write.
        options: how the user wants it.
        learns: whether there are inputs to learn from.

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
    )
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
    choice = _choose(pair.base, targets, patterns, parts, config, options)
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
        warnings=tuple(_warnings(pair, changes, parts, oversized)),
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
    turned = [name for name in chosen if name in pair.structure.transposed]
    straight = [name for name in chosen if name not in set(turned)]
    return Patterns(
        include=patterns_for(chosen, sorted(others)),
        transposed=patterns_for(turned, straight) if turned else (),
    )


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


def _choose(
    base: Checkpoint,
    targets: tuple[Target, ...],
    patterns: Patterns,
    parts: Split,
    config: Mapping[str, Any],
    options: Options,
) -> budgets.Choice:
    """Choose the method given by hand, or the one that the budget buys."""
    bits = budgets.BITS if options.bits is None else options.bits
    overhead = partial(_overhead, base, targets, patterns, parts, config, options, bits)
    given = options.method
    if given is None or isinstance(given, str):
        budget = DEFAULT_BUDGET if options.budget is None else options.budget
        return budgets.choose(budget, overhead, targets, bits=bits, family=given)
    choice = budgets.Choice(method=given, bits=bits)
    if options.budget is not None:
        budgets.check_fits(choice, options.budget, overhead, targets)
    return choice


def _overhead(
    base: Checkpoint,
    targets: tuple[Target, ...],
    patterns: Patterns,
    parts: Split,
    config: Mapping[str, Any],
    options: Options,
    bits: int,
    method: Method,
) -> int:
    """Count the bytes beside the coefficients: extras, and a header written with none of both."""
    manifest = Manifest(
        base=Base(
            name=options.name or base.path.name,
            root="sha256:" + "0" * 64,
            tensors=len(base.names),
            fingerprints=b"\0" * 2 * len(base.names) if len(base.names) <= FINGERPRINTED else b"",
        ),
        method=method,
        seed=options.seed,
        patterns=patterns,
        count=len(targets),
        bits=bits,
        scales=(Scale(),) * len(_groups(method, targets)),
        extras=in_name_order(change.name for change in parts.extras),
        result="sha256:" + "0" * 64,
        made=LONGEST_MADE,
        config=config,
    )
    empty = np.empty(0, np.uint8)
    extras = {
        c.name: RawTensor(dtype="F32", shape=(0, *c.shape[1:]), data=empty) for c in parts.extras
    }
    header = Delta(manifest=manifest, blob=empty, extras=extras).file_size()
    return header + OFFSETS * (1 + len(extras)) + sum(change.nbytes for change in parts.extras)


def _groups(method: Method, targets: Sequence[Target]) -> list[Group]:
    """List all groups of coefficients that a file holds."""
    return [*method.shared(), *(group for target in targets for group in method.groups(target))]


def _warnings(
    pair: Pair, changes: Sequence[Change], parts: Split, oversized: Sequence[str]
) -> list[str]:
    found = []
    if pair.note:
        found.append(f"no module was built, tensors are told by their names: {pair.note}")
    if reason := _swapped(pair, changes):
        found.append(f"{reason}: are the two models given in the right order, base first?")
    share = energy(parts.dropped) / max(energy(changes), 1e-60)
    if share > LOUD:
        largest = sorted(parts.dropped, key=lambda change: -change.norm)
        names = ", ".join(change.name for change in largest if not change.is_new)
        found.append(
            f"{share:.0%} of the change is not stored: {_short(names)}; see --targets and --extras"
        )
    new = [change.name for change in parts.dropped if change.is_new]
    if new:
        found.append(f"new tensors are not stored: {_short(', '.join(new))}; see --extras")
    if oversized:
        found.append(f"the configuration travels without {', '.join(oversized)}")
    return found


def _short(names: str, width: int = 200) -> str:
    return names if len(names) <= width else names[: width - 3] + "..."


def _swapped(pair: Pair, changes: Sequence[Change]) -> str:
    """Why base and tuned model look exchanged; empty where nothing does."""
    heads = [n for n in pair.base.names if n.startswith(HEADS) and n not in pair.tuned]
    if heads and not any(change.is_new for change in changes):
        return f"the base holds {_short(', '.join(heads))}, which the tuned model lacks"
    return traces_of_training(pair.base.path, pair.tuned.path)
