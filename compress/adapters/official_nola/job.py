"""Where the layers of an official NOLA checkpoint belong in the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kilodelta.compress.adapters.architecture import AdaptedArchitecture, read_architecture
from kilodelta.compress.adapters.official_nola.checkpoint import Factor, NolaCheckpoint
from kilodelta.compress.adapters.placing import Place, find_place
from kilodelta.compress.adapters.reader import ReadOptions
from kilodelta.compress.distill.changes.patterns import patterns_for
from kilodelta.errors import BaseMismatchError, InputError
from kilodelta.files import dtypes
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.foreign import OfficialNola
from kilodelta.format.targets import Patterns, Target
from kilodelta.merging.build import targets

FUSED = {"nola_query": 0, "nola_value": 1}
"""Layers of the GPT-2 variant that add to parts of `c_attn`, by the order of the parts."""
BESIDE = {"nola_query": "c_attn", "nola_value": "c_attn", "p1_nola": "c_fc", "p2_nola": "c_proj"}
"""Its layers that lie beside the module whose weight they change."""

Parts = Mapping[str, tuple[str, ...]]
"""Target's name to the paths of the layers that change it, in the order of their parts."""


@dataclass(frozen=True, kw_only=True)
class NolaJob:
    """A checkpoint and where its layers belong in the base.

    Attributes:
        checkpoint: the layers' factors.
        layout: the base's tensors that they change.
        patterns: globs that choose these.
        parts: each target's layers.
        form: the compatibility form.
        options: how the user wants it read.
        note: where in the base the layers were found, if not under their own names.
    """

    checkpoint: NolaCheckpoint
    layout: tuple[Target, ...]
    patterns: Patterns
    parts: Parts
    form: OfficialNola
    options: ReadOptions
    note: str

    def factors(self, name: str, side: str) -> list[Factor]:
        """Return one side's factors of a target, part by part."""
        return [self.checkpoint.layers[path][side] for path in self.parts[name]]


def find_job(checkpoint: NolaCheckpoint, base: Checkpoint, options: ReadOptions) -> NolaJob:
    """Find a checkpoint's layers in the base.

    Raises:
        BaseMismatchError: the base lacks a layer, or a shape is another one.
        InputError: alpha is not known, layers disagree about rank or bases, or the checkpoint
            holds tensors that are no part of a layer.
    """
    owners = {path: _owner(path) for path in checkpoint.layers}
    architecture = read_architecture(base, {})
    place = find_place(
        tuple(dict.fromkeys(owners.values())),
        architecture,
        checkpoint.path,
        weight=lambda path, place: architecture.weight(place.to_model(path) or ""),
        fits=lambda path, shape: _fits(checkpoint, owners, path, shape),
        prefix=options.prefix,
    )
    _refuse_others(checkpoint, architecture, place)
    parts: dict[str, list[str]] = {}
    for path in sorted(owners, key=lambda path: FUSED.get(path.rpartition(".")[2], 0)):
        parts.setdefault(_target(checkpoint, architecture, place, owners[path]), []).append(path)
    gpt2 = any(path.rpartition(".")[2] in BESIDE for path in checkpoint.layers)
    patterns = _patterns(base, list(parts), transposed=gpt2 or checkpoint.fan_in_fan_out)
    job = NolaJob(
        checkpoint=checkpoint,
        layout=targets(base, patterns),
        patterns=patterns,
        parts={name: tuple(paths) for name, paths in parts.items()},
        form=_form(checkpoint, options, gpt2=gpt2),
        options=options,
        note=place.note,
    )
    _check_shapes(job)
    return job


def _owner(path: str) -> str:
    front, _, last = path.rpartition(".")
    return f"{front}.{BESIDE[last]}" if last in BESIDE else path


def _fits(
    checkpoint: NolaCheckpoint, owners: Mapping[str, str], path: str, shape: tuple[int, ...]
) -> bool:
    """Return whether a layer's inputs are a side of a weight: the GPT-2 code's are its second."""
    sides = {
        layer["A"].start.shape[1] for at, layer in checkpoint.layers.items() if owners[at] == path
    }
    return sides <= set(shape)


def _target(
    checkpoint: NolaCheckpoint, architecture: AdaptedArchitecture, place: Place, owner: str
) -> str:
    """Return the base's tensor that a layer changes.

    Raises:
        InputError: it is no float matrix, or another layer of the model has it as well.
    """
    name = architecture.weight(place.to_model(owner) or "") or ""
    tensor = architecture.names.get(name, "")
    tied = [other for other in architecture.tied(name) if other != name]
    if tensor == "" or tied:
        raise InputError(
            f"{checkpoint.path} changes {name}, which is one tensor with {tied[0]} in the base"
            if tied
            else f"{checkpoint.path} changes {name}, which the base holds in parts",
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


def _refuse_others(
    checkpoint: NolaCheckpoint, architecture: AdaptedArchitecture, place: Place
) -> None:
    """See that what is no part of a factor is the base's own tensor.

    Raises:
        InputError: it is another one, which the import would lose.
    """
    for name, tensor in checkpoint.others.items():
        known = architecture.names.get(place.to_model(name) or "")
        if known is not None and tensor.equals(architecture.base.raw(known)):
            continue
        raise InputError(
            f"{checkpoint.path} holds {name!r:.200} {tensor.shape}, which is no part of a NOLA"
            " layer and not the base's tensor of that name",
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


def _form(checkpoint: NolaCheckpoint, options: ReadOptions, *, gpt2: bool) -> OfficialNola:
    factors = [factor for layer in checkpoint.layers.values() for factor in layer.values()]
    ranks = {layer["A"].start.shape[0] for layer in checkpoint.layers.values()}
    bases = {len(factor.coefficients) for factor in factors}
    for what, values in (("rank", ranks), ("number of bases", bases)):
        if len(values) != 1:
            raise InputError(
                f"{checkpoint.path}: the {what} differs between layers: {sorted(values)}",
                fix="give a checkpoint of the official code, which has one for all",
            )
    alpha = checkpoint.alpha if options.alpha is None else options.alpha
    if alpha is None:
        raise InputError(
            f"{checkpoint.path} does not say alpha, which its update is multiplied by",
            fix="add --alpha, as in training (--lora_alpha of the official GPT-2 script)",
        )
    both = any(layer["B"].start.any() for layer in checkpoint.layers.values())
    return OfficialNola(
        rank=ranks.pop(),
        bases=bases.pop(),
        alpha=alpha,
        layout="gpt2" if gpt2 else "plain",
        start="both" if both else "A",
    )


def _check_shapes(job: NolaJob) -> None:
    for target in job.layout:
        spans, paths = job.form.parts(target), job.parts[target.name]
        if len(spans) != len(paths):
            raise BaseMismatchError(
                f"{target.name} has {len(spans)} parts to update, the checkpoint has {paths}",
                fix="give the base that it was trained on",
            )
        for span, path in zip(spans, paths, strict=True):
            layer, rank = job.checkpoint.layers[path], job.form.rank
            shapes = layer["A"].start.shape, layer["B"].start.shape
            if shapes != ((rank, target.matrix[1]), (len(span), rank)):
                raise BaseMismatchError(
                    f"{path} has factors {shapes[0]} and {shapes[1]}; {target.name} of the base is "
                    f"(out, in) = {target.matrix}",
                    fix="give the base that it was trained on",
                )
