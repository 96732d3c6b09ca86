"""Build the graph of adapter mode: one graph that serves every low-rank fine-tune of a base.

The low-rank factors of chosen weights become inputs, so that switching to another fine-tune means
binding other inputs. To y = x W the graph adds (x A) B behind the product, which leaves nearly all
that a runtime fuses as it was: with factors of zeros the outputs are the base's, bit for bit.
(Not so where a runtime folds a batch norm into a convolution: those outputs agree to rounding.)

A head that the base lacks differs as a whole in every fine-tune, so its tensors become inputs also.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kilodelta.errors import InputError
from kilodelta.export.adapter.heads import free_heads
from kilodelta.export.adapter.layout import MAX_SLOTS, AdapterLayout, Exposed, StoredInput
from kilodelta.export.adapter.sites import GraphSite, is_layer, sites, use_of
from kilodelta.export.adapter.surgery import Surgery
from kilodelta.export.onnx.template import Template, port
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.model_digest import digest
from kilodelta.files.tensor import RawTensor, TensorInfo
from kilodelta.format.fields import MAX_RANK
from kilodelta.format.targets import Patterns, matches, select
from kilodelta.grid.model import QuantisedModel
from kilodelta.merging.quantised import grid_of

NOTHING: Mapping[str, RawTensor] = MappingProxyType({})


def with_adapter(
    template: Template,
    base: Checkpoint | str | Path,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    layers: Container[str] = (),
    stacks: Container[str] = (),
    heads: Mapping[str, RawTensor] = NOTHING,
    whole: Sequence[str] = (),
    name: str = "",
    rank: int = 8,
    slots: int = 0,
    optional: bool = False,
    any_labels: bool = True,
    quantised: QuantisedModel | None = None,
) -> tuple[Template, AdapterLayout]:
    """Turn a template into one whose low-rank factors are inputs; fill it with the base's weights.

    Args:
        template: of the base's architecture, or of its fine-tunes'; it stays as it is.
        base: what the fine-tunes were made of; the layout records its root.
        include: globs of the weights to expose; none for every linear layer and convolution.
        exclude: globs of weights that stay fixed.
        layers: further weights that are exposed where no globs are given: those of layers whose
            products the graph does not show as such (experts that it stacks, packed projections
            that it cuts). Each is updated as a whole at every request, so not with slots.
        stacks: tensors (experts, rows, columns) that fine-tunes change matrix by matrix.
        heads: tensors of the architecture that the base lacks, with values to start from
            (`kilodelta.export.open_headed`). They are inputs that every fine-tune brings.
        whole: globs of tensors of the base that fine-tunes may store whole, such as `*.bias`.
        name: the base's name, for messages.
        rank: the highest rank that the graph takes; request time grows with it.
        slots: fine-tunes that one batch may mix, chosen for each row by the input `adapter`;
            0 for one fine-tune at a time.
        optional: inputs that are not fed are zeros, or the base's values. ONNX Runtime's own
            adapter files need this; TensorRT must not have it: it would take them for constants.
        any_labels: let a head that is the last layer have any number of labels. Not for TensorRT,
            and not with slots, whose fine-tunes share one output.
        quantised: the quantised base whose values `base` holds as floats, under its weights' names:
            fine-tunes are made for it. Fill the wide template, then put the codes in.

    Returns:
        The wide template, and the layout to write beside the graph.

    Raises:
        InputError: nothing is exposed, or an option makes no sense.
        ExportError: a weight's update cannot be chosen row by row; names the weight and the node.
    """
    _check_options(rank, slots)
    source = Checkpoint.open(base)
    model = template.model.clone()
    infos = _infos(source, quantised)
    values = {name: source.raw(name) for name in infos if matches(name, whole)}
    if quantised is not None:
        values = {name: raw for name, raw in values.items() if name not in quantised.stored}
    if whole and not values:
        raise InputError(
            f"no tensor of {source.path} matches {', '.join(whole)}",
            fix="list its tensors: kilodelta digest --tensors",
        )
    stored, defaults = _stored(template, values | dict(heads), heads)
    free = free_heads(model, heads) if any_labels and not slots else frozenset[str]()
    taken = {one.info.name for one in stored}
    others = [info for name, info in infos.items() if name not in taken]
    candidates = _matching(model, others, include, exclude)
    chosen = [
        (info, uses)
        for info, uses in candidates
        if include or is_layer(uses, by_row=slots > 0) or (not slots and info.name in layers)
    ]
    if not any(uses for _, uses in chosen):
        raise InputError(
            f"no weight that the outputs depend on matches {', '.join(include) or 'a layer'}",
            fix="`kilodelta inspect FILE` shows what a file changes; expose those",
        )
    layout = AdapterLayout(
        base_name=name,
        base_root=digest(source).root if quantised is None else quantised.stored_identity().root,
        grid=None if quantised is None else grid_of(quantised.identity()),
        rank=rank,
        slots=slots,
        dtype=template.dtype,
        optional=optional,
        exposed=tuple(
            Exposed(info=info, use="stack" if uses and info.name in stacks else use_of(uses))
            for info, uses in chosen
        ),
        stored=tuple(replace(one, is_free=one.info.name in free) for one in stored),
        defaults=defaults,
    )
    surgery = Surgery(model, layout)
    for tensor, (_, uses) in zip(layout.exposed, chosen, strict=True):
        surgery.expose(tensor, uses)
    surgery.store(layout.stored)
    wide = replace(
        template,
        model=model,
        weights={n: shape for n, shape in template.weights.items() if n not in defaults},
        inputs=tuple(map(port, model.graph.inputs)),
        outputs=tuple(map(port, model.graph.outputs)),
    )
    return wide, layout


def _check_options(rank: int, slots: int) -> None:
    if not 1 <= rank <= MAX_RANK:
        raise InputError(f"rank {rank} is not from 1 to {MAX_RANK}", fix="8 is a usual rank")
    if not 0 <= slots <= MAX_SLOTS:
        raise InputError(
            f"{slots} slots are not from 0 to {MAX_SLOTS}", fix="0 for one fine-tune at a time"
        )


def _infos(source: Checkpoint, quantised: QuantisedModel | None) -> dict[str, TensorInfo]:
    """List the base's tensors; of a quantised one its weights, and all that is no part of one."""
    if quantised is not None:
        return {info.name: info for info in quantised.infos()}
    return {name: source.info(name) for name in source.names}


def _matching(
    model: Any, tensors: Sequence[TensorInfo], include: Sequence[str], exclude: Sequence[str]
) -> list[tuple[TensorInfo, tuple[GraphSite, ...]]]:
    """Find the weights that globs allow to expose, in name order, each with its uses."""
    infos = {info.name: info for info in tensors}
    patterns = Patterns(include=tuple(include) or ("*",), exclude=tuple(exclude))
    weights = model.graph.initializers
    return [
        (infos[target.name], sites(weights[target.name]) if target.name in weights else ())
        for target in select(infos.values(), patterns)
    ]


def _stored(
    template: Template, values: Mapping[str, RawTensor], heads: Mapping[str, RawTensor]
) -> tuple[list[StoredInput], dict[str, RawTensor]]:
    """List the tensors that fine-tunes bring whole in name order, and the values of those used."""
    stored = [
        StoredInput(
            info=values[name].info(name),
            is_new=name in heads,
            is_free=False,
            is_used=name in template.weights,
        )
        for name in sorted(values)
    ]
    defaults = {one.info.name: values[one.info.name] for one in stored if one.is_used}
    return stored, defaults
