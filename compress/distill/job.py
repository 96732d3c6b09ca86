"""What is known before the first step: what changed, what carries it how, and with which method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from kilodelta import __version__
from kilodelta.compress.distill import budget as budgets
from kilodelta.compress.distill.changes import Change, Split, compare, patterns_for, split
from kilodelta.compress.distill.options import DEFAULT_BUDGET, Options
from kilodelta.errors import InputError
from kilodelta.files.checkpoint import Checkpoint, in_name_order
from kilodelta.files.tensor import RawTensor
from kilodelta.format.coefficients import Group, Scale
from kilodelta.format.delta import Delta
from kilodelta.format.manifest import Base, Manifest
from kilodelta.format.methods import Method
from kilodelta.format.targets import Patterns, Target, select
from kilodelta.merging.build import FINGERPRINTED
from kilodelta.models import LoadedModel, open_model

LONGEST_MADE: Mapping[str, str | int | float] = {
    "tool": f"kilodelta {__version__}",
    "agreement": -0.1234,
    "kl": 10.12345,
    "held_out": 100000,
    "inputs": "0" * 12,
    "steps": 100000,
    "weight_error": 10.1234,
}
"""What the longest report in a manifest looks like."""
OFFSETS = 16
"""Bytes that a tensor's shape and place in the file may take beyond those of an empty one."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that is known before the first step."""

    base: Checkpoint
    tuned: Checkpoint
    out: Path
    options: Options
    student: LoadedModel
    names: Mapping[str, str]
    """Checkpoint name to state name, of the base's tensors and of those that only `tuned` has."""
    changes: tuple[Change, ...]
    split: Split
    targets: tuple[Target, ...]
    patterns: Patterns
    method: Method
    bits: int

    @property
    def coefficients(self) -> int:
        """How many numbers are trained, beside extras."""
        return sum(group.size for group in _groups(self.method, self.targets))


def prepare(base: Path, tuned: Path, out: Path, options: Options) -> Job:
    if not out.parent.exists():
        raise InputError(f"{out.parent} does not exist", fix="make the folder first")
    before = Checkpoint.open(base)
    student = open_model(options.model or str(tuned), weights=before)
    after, names = _as_base_names(Checkpoint.open(tuned), student, options)
    changes = compare(before, after)
    parts = _split(student, changes, options)
    patterns = _patterns(before, student, parts)
    targets = select((before.info(name) for name in before.names), patterns)
    choice = _choose(before, targets, patterns, parts, options)
    return Job(
        base=before,
        tuned=after,
        out=out,
        options=options,
        student=student,
        names=names,
        changes=changes,
        split=parts,
        targets=targets,
        patterns=patterns,
        method=choice.method,
        bits=choice.bits,
    )


def _as_base_names(
    tuned: Checkpoint, student: LoadedModel, options: Options
) -> tuple[Checkpoint, dict[str, str]]:
    """The tuned model under the base's names, and all names by the student's state: a new head
    puts a prefix before the names of the encoder below it."""
    own = open_model(options.model or str(tuned.path), weights=tuned).names
    base_name = {state: name for name, state in student.names.items()}
    new = {name: base_name.get(state, name) for name, state in own.items()}
    return tuned.renamed(new), {**{new[name]: own[name] for name in own}, **student.names}


def _split(student: LoadedModel, changes: Sequence[Change], options: Options) -> Split:
    state_names = {state: name for name, state in student.names.items()}
    weights = [
        f"{path}.weight"
        for path, module in student.module.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.modules.conv._ConvNd))
        or type(module).__name__ == "Conv1D"
    ]
    parameters = {name for name, _ in student.module.named_parameters(remove_duplicate=False)}
    buffers = [n for state, n in state_names.items() if state not in parameters]
    return split(
        changes,
        include=options.targets,
        exclude=options.exclude,
        extras=options.extras,
        layers=[state_names[name] for name in weights if name in state_names],
        buffers=buffers,
    )


def _patterns(base: Checkpoint, student: LoadedModel, parts: Split) -> Patterns:
    infos = [base.info(name) for name in base.names]
    matrices = [t.name for t in select(infos, Patterns(include=("*",)))]
    chosen = [change.name for change in parts.targets]
    others = [name for name in matrices if name not in set(chosen)]
    turned = [name for name in chosen if _is_transposed(student, name)]
    straight = [name for name in chosen if name not in set(turned)]
    return Patterns(
        include=patterns_for(chosen, others),
        transposed=patterns_for(turned, straight) if turned else (),
    )


def _is_transposed(student: LoadedModel, name: str) -> bool:
    owner = student.names[name].rpartition(".")[0]
    return type(student.module.get_submodule(owner)).__name__ == "Conv1D"


def _choose(
    base: Checkpoint,
    targets: tuple[Target, ...],
    patterns: Patterns,
    parts: Split,
    options: Options,
) -> budgets.Choice:
    """The method given by hand, or the one that the budget buys."""
    bits = options.bits or budgets.BITS
    overhead = partial(_overhead, base, targets, patterns, parts, options, bits)
    given = options.method
    if given is None or isinstance(given, str):
        budget = options.budget or DEFAULT_BUDGET
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
    options: Options,
    bits: int,
    method: Method,
) -> int:
    """Bytes of a file beside its coefficients: extras, and a header written with none of both."""
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
    )
    empty = np.empty(0, np.uint8)
    extras = {
        c.name: RawTensor(dtype="F32", shape=(0, *c.shape[1:]), data=empty) for c in parts.extras
    }
    header = Delta(manifest=manifest, blob=empty, extras=extras).file_size()
    return header + OFFSETS * (1 + len(extras)) + sum(change.nbytes for change in parts.extras)


def _groups(method: Method, targets: Sequence[Target]) -> list[Group]:
    """All groups of coefficients that a file holds."""
    return [*method.shared(), *(group for target in targets for group in method.groups(target))]
