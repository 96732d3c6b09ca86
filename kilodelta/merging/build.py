"""Make a delta in memory: coefficients in, a checked delta with its proof out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, prod
from typing import Any

import numpy as np

from kilodelta.errors import InputError
from kilodelta.exact.bounds import exactness
from kilodelta.exact.selftest import require_good_kernels
from kilodelta.files.checkpoint import Checkpoint, in_name_order
from kilodelta.files.identity import Identity, fingerprints, root
from kilodelta.files.model_digest import digest
from kilodelta.files.tensor import RawTensor
from kilodelta.format.delta import Delta
from kilodelta.format.foreign import stored
from kilodelta.format.form import Form
from kilodelta.format.manifest import FLOATS, Base, Manifest
from kilodelta.format.manifest import parse as parse_manifest
from kilodelta.format.methods import Method
from kilodelta.format.packing import Group, Ints, pack
from kilodelta.format.quantise import Floats, Quantised, quantise, scale_near
from kilodelta.format.targets import Patterns, Target, select
from kilodelta.grid.model import QuantisedModel
from kilodelta.grid.open import is_quantised, open_quantised
from kilodelta.merging.grid_results import FINGERPRINTED as FINGERPRINTED
from kilodelta.merging.grid_results import with_results
from kilodelta.merging.proof import target_digests
from kilodelta.progress import Progress, silent

Numbers = Quantised | Floats
"""A group's coefficients."""

MANTISSAS = (255, 127, 63, 31, 15, 7, 3, 1)
"""Largest mantissas of scales, finest first, that `quantise_target` tries."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a delta is made of, before its coefficients: everything but the numbers."""

    method: Form
    patterns: Patterns
    seed: int = 0
    bits: int = 8
    """Of an integer coefficient; of a float one, 32 or 16, in a compatibility form."""
    name: str = ""
    """What the base is called, for people."""
    extras: Mapping[str, RawTensor] = field(default_factory=dict)
    probes: Mapping[str, RawTensor] = field(default_factory=dict)
    made: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    """What the fine-tune changed in the base's `config.json`."""


Model = str | os.PathLike[str] | Checkpoint | QuantisedModel
"""A base, float or quantised."""


def targets(base: Model, patterns: Patterns) -> tuple[Target, ...]:
    """Return the targets that patterns choose in a base, float or quantised.

    Raises:
        InputError: they choose none.
    """
    path: object = base
    if is_quantised(base):
        model = open_quantised(base)
        path, infos = model.path, list(model.infos())
    else:
        assert not isinstance(base, QuantisedModel)
        checkpoint = Checkpoint.open(base)
        path, infos = checkpoint.path, [checkpoint.info(name) for name in checkpoint.names]
    chosen = select(infos, patterns)
    if not chosen:
        raise InputError(
            f"no float matrix of {path} matches {list(patterns.include)}",
            fix="list the tensors with kilodelta digest --tensors, and mind that case counts",
        )
    return chosen


def build(
    base: Model,
    recipe: Recipe,
    coefficients: Mapping[str, Mapping[str, Numbers]],
    shared: Mapping[str, Numbers] | None = None,
    *,
    threads: int | None = None,
    progress: Progress = silent,
) -> Delta:
    """Make a delta from its coefficients, bound to its base, with its result's root computed.

    Args:
        base: the model that the delta changes; of a quantised one the file states both results.
        recipe: everything but the coefficients.
        coefficients: by target name, then by group name; integers with their scale, or plain
            arrays for a compatibility form.
        shared: the groups that the whole file has once, by name.
        threads: cores to use; all by default.
        progress: receives how far the work is.

    Raises:
        InputError: a group is missing or has another shape, or the patterns choose other tensors.
        FileError: an update cannot be exact.
        CheckpointError: a target of the base holds NaN or infinity.

    Example:
        >>> from kilodelta.format.methods import Lora
        >>> base = "tests/golden/0.1.0/base.safetensors"
        >>> recipe = Recipe(method=Lora(rank=1), patterns=Patterns(include=("tall.weight",)))
        >>> ones = {"A": np.ones((1, 4)) / 8, "B": np.ones((11, 1))}
        >>> made = build(base, recipe, {"tall.weight": quantise_target(recipe.method, ones, 8)})
        >>> made.update("tall.weight")[0, 0]
        np.float32(0.12493897)
    """
    require_good_kernels()
    layout = targets(base, recipe.patterns)
    _check_names(layout, coefficients)
    groups = _in_order(recipe.method, layout, coefficients, shared or {})
    blob = np.concatenate([np.empty(0, np.uint8), *(_packed(*g, recipe.bits) for g in groups)])
    draft = Delta(
        manifest=_manifest(recipe, layout, groups),
        blob=blob,
        extras=dict(recipe.extras),
        probes=dict(recipe.probes),
        max_work=inf,  # whoever makes a delta may ask for as much work as needed
    )
    if is_quantised(base):
        model = open_quantised(base)
        return with_results(draft, model, threads=threads, progress=progress)[0]
    assert not isinstance(base, QuantisedModel)
    checkpoint = Checkpoint.open(base)
    identity = digest(checkpoint, threads=threads, progress=progress)
    manifest = replace(draft.manifest, base=_base(recipe.name, identity))
    bound = replace(draft, manifest=manifest).bind(checkpoint)
    digests = target_digests(bound, checkpoint, threads=threads, progress=progress)
    manifest = replace(manifest, result=root(digests.values()))
    parse_manifest(manifest.text())  # nothing is made that a reader would refuse
    return replace(bound, manifest=manifest)


def _check_names(
    layout: Sequence[Target], coefficients: Mapping[str, Mapping[str, Numbers]]
) -> None:
    wrong = {target.name for target in layout} ^ set(coefficients)
    if wrong:
        raise InputError(
            f"the patterns and the coefficients disagree about {min(wrong)!r}",
            fix="give coefficients for exactly the tensors that the patterns choose",
        )


def _in_order(
    method: Form,
    layout: Sequence[Target],
    coefficients: Mapping[str, Mapping[str, Numbers]],
    shared: Mapping[str, Numbers],
) -> list[tuple[Group, Numbers]]:
    """Return all groups in file order with their numbers."""
    ordered = [(group, _take(group, shared, "the file")) for group in method.shared()]
    for target in layout:
        own = coefficients[target.name]
        ordered += [(group, _take(group, own, target.name)) for group in method.groups(target)]
    return ordered


def _take(group: Group, given: Mapping[str, Numbers], where: str) -> Numbers:
    if group.name not in given:
        raise InputError(f"{where} lacks group {group.name!r}", fix=f"its shape is {group.shape}")
    value = given[group.name]
    shape = value.q.shape if isinstance(value, Quantised) else value.shape
    if shape != group.shape:
        raise InputError(
            f"group {group.name!r} of {where} has shape {shape}",
            fix=f"its shape must be {group.shape}",
        )
    return value


def _packed(group: Group, value: Numbers, bits: int) -> Ints:
    if isinstance(value, Quantised):
        return pack(value.q, bits)
    return stored.pack(value, group.dtype or FLOATS[bits])


def _base(name: str, identity: Identity) -> Base:
    tensors = len(identity.tensors)
    prints = fingerprints(identity) if tensors <= FINGERPRINTED else b""
    return Base(name=name, root=identity.root, tensors=tensors, fingerprints=prints)


def _manifest(
    recipe: Recipe, layout: Sequence[Target], groups: Sequence[tuple[Group, Numbers]]
) -> Manifest:
    """Make the manifest without what the base's bytes decide: its identity, and the result."""
    return Manifest(
        base=Base(name=recipe.name, root="", tensors=0),
        method=recipe.method,
        seed=recipe.seed,
        patterns=recipe.patterns,
        count=len(layout),
        bits=recipe.bits,
        scales=tuple(value.scale for _, value in groups if isinstance(value, Quantised)),
        extras=in_name_order(recipe.extras),
        # A placeholder: the root is that of the merge, for which there has to be a delta first.
        result="sha256:" + "0" * 64,
        made=dict(recipe.made),
        config=dict(recipe.config),
    )


def quantise_target(
    method: Method,
    values: Mapping[str, Floats | float],
    bits: int,
    shared: Mapping[str, Quantised] | None = None,
) -> dict[str, Quantised]:
    """Quantise a target's groups with the finest scales that keep its update exact.

    Args:
        method: whose groups they are.
        values: float coefficients by group, each in its group's shape; for a group without
            coefficients (Uni-LoRA's `size`) the positive number that its scale stands for.
        bits: 4, 8 or 16.
        shared: the file's shared groups, already quantised.

    Raises:
        InputError: not even scales with c = 1 keep the sums below 2^53.
    """
    problem = ""
    for c_max in MANTISSAS:
        own = {name: _quantise(value, bits, c_max) for name, value in values.items()}
        problem = update_problem(method, {**(shared or {}), **own})
        if not problem:
            return own
    raise InputError(f"the update cannot be exact: {problem}", fix="use fewer bits or fewer bases")


def _quantise(value: Floats | float, bits: int, c_max: int) -> Quantised:
    if np.ndim(value):
        return quantise(np.asarray(value), bits, c_max)
    return Quantised(q=np.empty(0, np.int8), scale=scale_near(float(value), c_max))


def update_problem(method: Method, groups: Mapping[str, Quantised]) -> str:
    """Say what keeps an update of these groups from being exact; empty if nothing."""
    scales = [groups[name].scale for name in method.scales()]
    bound = method.bound({name: group.q for name, group in groups.items()})
    return exactness(prod(s.c for s in scales) * bound, sum(s.e for s in scales))
