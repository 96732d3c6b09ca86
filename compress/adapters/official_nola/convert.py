"""The official NOLA code's adapters into their compatibility form, or by their factors into LoRA.

Source: Koohpayegani et al., https://arxiv.org/abs/2310.02556, its authors' GPT-2 and LLaMA code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import numpy as np

from kilodelta.compress.adapters.architecture import Architecture, read_architecture
from kilodelta.compress.adapters.low_rank import Product, low_rank_adapter
from kilodelta.compress.adapters.official_nola.checkpoint import (
    Factor,
    NolaCheckpoint,
    open_checkpoint,
    without_front,
)
from kilodelta.compress.adapters.placing import Place, find_place
from kilodelta.compress.adapters.reader import ParsedAdapter, ReadOptions
from kilodelta.compress.adapters.tensors import floats
from kilodelta.compress.distill.changes.patterns import patterns_for
from kilodelta.errors import BaseMismatchError, InputError
from kilodelta.files import dtypes
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.foreign import OfficialNola
from kilodelta.format.foreign.official_nola import mix
from kilodelta.format.methods import Lora
from kilodelta.format.quantise import Floats
from kilodelta.format.targets import Patterns, Target
from kilodelta.merging.build import Recipe, targets

FUSED = {"nola_query": 0, "nola_value": 1}
"""Layers of the GPT-2 variant that add to parts of `c_attn`, by the order of the parts."""
BESIDE = {"nola_query": "c_attn", "nola_value": "c_attn", "p1_nola": "c_fc", "p2_nola": "c_proj"}
"""Its layers that lie beside the module whose weight they change."""

Parts = Mapping[str, tuple[str, ...]]
"""Target's name to the paths of the layers that change it, in the order of their parts."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A checkpoint and where its layers belong in the base."""

    found: NolaCheckpoint
    layout: tuple[Target, ...]
    patterns: Patterns
    parts: Parts
    form: OfficialNola
    options: ReadOptions

    def factors(self, name: str, side: str) -> list[Factor]:
        return [self.found.layers[path][side] for path in self.parts[name]]


def read(path: Path, base: Checkpoint, options: ReadOptions) -> ParsedAdapter:
    """Parse an official checkpoint; by `options.factors` where its bases were drawn on a GPU.

    Raises:
        CheckpointError: it is damaged or incomplete.
        BaseMismatchError: its layers are not the base's.
        InputError: alpha or the device of the bases is not known, or shapes do not agree.
    """
    job = _job(open_checkpoint(path), base, options)
    if options.factors:
        return _by_factors(job, Checkpoint.open(options.factors))
    _require_cpu(job.found, options)
    return _by_bases(job)


def _require_cpu(found: NolaCheckpoint, options: ReadOptions) -> None:
    """Refuse bases that cannot be drawn again: only a CPU's numbers can."""
    reason = "numbers drawn on a CUDA device depend on the GPU model, and only CPU ones return"
    way = "--factors FILE with the factors computed on that GPU (docs/import.md has the lines)"
    if options.drawn_on != "cpu":
        raise InputError(
            f"{found.path} does not say where its bases were drawn: {reason}",
            fix=f"give {way}, or --drawn-on cpu if the training ran on a CPU",
        )
    if found.device is not None and "cuda" in found.device:
        raise InputError(f"{found.path} was saved from {found.device}: {reason}", fix=f"give {way}")


def _job(found: NolaCheckpoint, base: Checkpoint, options: ReadOptions) -> _Job:
    owners = {path: _owner(path) for path in found.layers}
    architecture = read_architecture(base, {})
    place = find_place(
        tuple(dict.fromkeys(owners.values())),
        architecture,
        found.path,
        weight=lambda path, place: architecture.weight(place.to_model(path) or ""),
        fits=lambda path, shape: _fits(found, owners, path, shape),
        prefix=options.prefix,
    )
    _refuse_others(found, architecture, place)
    parts: dict[str, list[str]] = {}
    for path in sorted(owners, key=lambda path: FUSED.get(path.rpartition(".")[2], 0)):
        parts.setdefault(_target(found, architecture, place, owners[path]), []).append(path)
    gpt2 = any(path.rpartition(".")[2] in BESIDE for path in found.layers)
    patterns = _patterns(base, list(parts), transposed=gpt2 or found.fan_in_fan_out)
    job = _Job(
        found=found,
        layout=targets(base, patterns),
        patterns=patterns,
        parts={name: tuple(paths) for name, paths in parts.items()},
        form=_form(found, options, gpt2=gpt2),
        options=options,
    )
    _check_shapes(job)
    return job


def _owner(path: str) -> str:
    front, _, last = path.rpartition(".")
    return f"{front}.{BESIDE[last]}" if last in BESIDE else path


def _fits(
    found: NolaCheckpoint, owners: Mapping[str, str], path: str, shape: tuple[int, ...]
) -> bool:
    """Return whether a layer's inputs are a side of a weight: the GPT-2 code's are its second."""
    sides = {layer["A"].start.shape[1] for at, layer in found.layers.items() if owners[at] == path}
    return sides <= set(shape)


def _target(found: NolaCheckpoint, architecture: Architecture, place: Place, owner: str) -> str:
    """Return the base's tensor that a layer changes.

    Raises:
        InputError: it is no float matrix, or another layer of the model has it, too.
    """
    name = architecture.weight(place.to_model(owner) or "") or ""
    tensor = architecture.names.get(name, "")
    tied = [other for other in architecture.tied(name) if other != name]
    if tensor == "" or tied:
        raise InputError(
            f"{found.path} changes {name}, which is one tensor with {tied[0]} in the base"
            if tied
            else f"{found.path} changes {name}, which the base holds in parts",
            fix="merge it with its own code, and run kilodelta compress",
        )
    info = architecture.base.info(tensor)
    if info.dtype not in dtypes.TARGETS or len(info.shape) != 2:
        raise InputError(
            f"{architecture.base.path} holds {tensor}, which the checkpoint changes, as"
            f" {info.dtype} {info.shape}",
            fix="give the base before quantisation, in a float type",
        )
    return tensor


def _refuse_others(found: NolaCheckpoint, architecture: Architecture, place: Place) -> None:
    """See that what is no part of a factor is the base's own tensor.

    Raises:
        InputError: it is another one, which the import would lose.
    """
    for name, tensor in found.others.items():
        known = architecture.names.get(place.to_model(name) or "")
        if known is not None and tensor.equals(architecture.base.raw(known)):
            continue
        raise InputError(
            f"{found.path} holds {name!r:.200} {tensor.shape}, which is no part of a NOLA layer and"
            " not the base's tensor of that name",
            fix="leave it out if it belongs to something else; a head that was trained beside NOLA"
            " travels in a merged model, by kilodelta compress",
        )


def _patterns(base: Checkpoint, names: list[str], *, transposed: bool) -> Patterns:
    infos = [base.info(name) for name in base.names]
    others = [
        i.name
        for i in infos
        if i.dtype in dtypes.TARGETS and len(i.shape) >= 2 and i.name not in set(names)
    ]
    include = patterns_for(sorted(names), others)
    return Patterns(include=include, transposed=include if transposed else ())


def _form(found: NolaCheckpoint, options: ReadOptions, *, gpt2: bool) -> OfficialNola:
    factors = [factor for layer in found.layers.values() for factor in layer.values()]
    ranks = {layer["A"].start.shape[0] for layer in found.layers.values()}
    bases = {len(factor.coefficients) for factor in factors}
    for what, values in (("rank", ranks), ("number of bases", bases)):
        if len(values) != 1:
            raise InputError(
                f"{found.path}: the {what} differs between layers: {sorted(values)}",
                fix="give a checkpoint of the official code, which has one for all",
            )
    alpha = found.alpha if options.alpha is None else options.alpha
    if alpha is None:
        raise InputError(
            f"{found.path} does not say alpha, which its update is multiplied by",
            fix="add --alpha, as in training (--lora_alpha of the official GPT-2 script)",
        )
    both = any(layer["B"].start.any() for layer in found.layers.values())
    return OfficialNola(
        rank=ranks.pop(),
        bases=bases.pop(),
        alpha=alpha,
        layout="gpt2" if gpt2 else "plain",
        start="both" if both else "A",
    )


def _check_shapes(job: _Job) -> None:
    for target in job.layout:
        spans, paths = job.form.parts(target), job.parts[target.name]
        if len(spans) != len(paths):
            raise BaseMismatchError(
                f"{target.name} has {len(spans)} parts to update, the checkpoint has {paths}",
                fix="give the base that it was trained on",
            )
        for span, path in zip(spans, paths, strict=True):
            layer, rank = job.found.layers[path], job.form.rank
            found = layer["A"].start.shape, layer["B"].start.shape
            if found != ((rank, target.matrix[1]), (len(span), rank)):
                raise BaseMismatchError(
                    f"{path} has factors {found[0]} and {found[1]}; {target.name} of the base is "
                    f"(out, in) = {target.matrix}",
                    fix="give the base that it was trained on",
                )


def _by_bases(job: _Job) -> ParsedAdapter:
    own, factors = {}, {}
    for target in job.layout:
        own[target.name], factors[target.name] = _coefficients(job, target)
    return ParsedAdapter(
        source="official NOLA",
        recipe=_recipe(job, job.form, job.options.float_bits),
        coefficients=own,
        update=lambda name: Product(pair=factors[name]).update,
        notes=(
            "bases taken as drawn on a CPU in float32, drawn again and fingerprinted",
            "the official merge() multiplies lora_B.weight and lora_A.weight alone: not this",
        ),
    )


def _coefficients(job: _Job, target: Target) -> tuple[dict[str, Floats], tuple[Floats, Floats]]:
    """Return a target's groups, and the update's two factors in float64."""
    A, B = job.factors(target.name, "A"), job.factors(target.name, "B")
    drawn = [(_mixed(a), _mixed(b)) for a, b in zip(A, B, strict=True)]
    groups = {
        "seeds": np.array([(a.seed, b.seed) for a, b in zip(A, B, strict=True)]),
        "prints": np.array([[list(a[1]), list(b[1])] for a, b in drawn], np.uint8),
        "alpha": np.stack([factor.coefficients for factor in A]),
        "beta": np.stack([factor.coefficients for factor in B]),
        "A0": np.stack([factor.start for factor in A]),
    }
    if job.form.start == "both":
        groups["B0"] = np.stack([factor.start for factor in B])
    pair = _joined(job, target, [(b[0], a[0]) for a, b in drawn])
    return groups, pair


def _mixed(factor: Factor) -> tuple[Floats, bytes]:
    total, fingerprint = mix(factor.coefficients, factor.seed, factor.start.shape)
    return factor.start + total / sqrt(len(factor.coefficients)), fingerprint


def _joined(job: _Job, target: Target, pairs: list[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    """Join the parts' factors to those of the whole target, the scale in the left one."""
    rank, spans = job.form.rank, job.form.parts(target)
    left = np.zeros((target.matrix[0], len(spans) * rank))
    for p, (span, (B, _)) in enumerate(zip(spans, pairs, strict=True)):
        left[span.start : span.stop, p * rank : (p + 1) * rank] = job.form.scaling * B
    return left, np.concatenate([A for _, A in pairs]).astype(np.float64)


def _recipe(job: _Job, method: OfficialNola | Lora, bits: int) -> Recipe:
    return Recipe(method=method, patterns=job.patterns, bits=bits, name=job.options.name)


def _by_factors(job: _Job, given: Checkpoint) -> ParsedAdapter:
    """Parse the factors that the GPU computed as an exact LoRA."""
    keys = {without_front(key).replace(".default", ""): key for key in given.names}
    wanted = {
        f"{path}.lora_{side}": layer[side].start.shape
        for path, layer in job.found.layers.items()
        for side in "AB"
    }
    if wrong := sorted(keys.keys() ^ wanted.keys()):
        raise InputError(
            f"{given.path} and the checkpoint disagree about {wrong[0]}",
            fix="save one tensor for every NOLALinear, under its module's name",
        )
    for name, shape in wanted.items():
        if given.info(keys[name]).shape != shape:
            raise InputError(
                f"{given.path}: {keys[name]} has shape {given.info(keys[name]).shape}, not {shape}",
                fix="save the factor itself: generate_params(...) + weight",
            )
    products = {
        target.name: Product(
            pair=_given_pair(job, target, given, keys), transposed=target.transposed
        )
        for target in job.layout
    }
    return low_rank_adapter(
        "official NOLA, by its factors", products, _recipe(job, Lora(rank=1), job.options.bits)
    )


def _given_pair(
    job: _Job, target: Target, given: Checkpoint, keys: Mapping[str, str]
) -> tuple[Floats, Floats]:
    paths = job.parts[target.name]
    return _joined(
        job,
        target,
        [
            (floats(given, keys[f"{path}.lora_B"]), floats(given, keys[f"{path}.lora_A"]))
            for path in paths
        ],
    )
