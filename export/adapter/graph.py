"""Adapter mode, the build side: one graph that serves every low-rank fine-tune of a base.

The low-rank factors of chosen weights become inputs, so that switching to another fine-tune means
binding other inputs. To y = x W the graph adds (x A) B behind the product, which leaves nearly all
that a runtime fuses as it was: with factors of zeros the outputs are the base's, bit for bit.
(Not so where a runtime folds a batch norm into a convolution: those outputs agree to rounding.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kilodelta.errors import InputError
from kilodelta.export.adapter.layout import INDEX, MAX_SLOTS, AdapterLayout, Exposed
from kilodelta.export.adapter.sites import Site, is_layer, sites, use_of
from kilodelta.export.adapter.surgery import Surgery
from kilodelta.export.manifest.facts import Port
from kilodelta.export.onnx.template import Template
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.model_digest import digest
from kilodelta.files.tensor import TensorInfo
from kilodelta.format.fields import MAX_RANK
from kilodelta.format.targets import Patterns, select


def with_adapter(
    template: Template,
    base: Checkpoint | str | Path,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    name: str = "",
    rank: int = 8,
    slots: int = 0,
    optional: bool = False,
) -> tuple[Template, AdapterLayout]:
    """A template whose low-rank factors are inputs too; fill it with the base's weights.

    Args:
        template: of the base's architecture; it stays as it is.
        base: what the fine-tunes were made of; the layout records its root.
        include: globs of the weights to expose; none for every linear layer and convolution.
        exclude: globs of weights that stay fixed.
        name: the base's name, for messages.
        rank: the highest rank that the graph takes; request time grows with it.
        slots: fine-tunes that one batch may mix, chosen for each row by the input `adapter`;
            0 for one fine-tune at a time.
        optional: factors that are not fed are zeros. ONNX Runtime's own adapter files need this;
            TensorRT must not have it: it would take the zeros for constants.

    Raises:
        InputError: nothing is exposed, or an option makes no sense.
        ExportError: a weight's update cannot be chosen row by row; names the weight and the node.
    """
    _check_options(rank, slots)
    source = Checkpoint.open(base)
    model = template.model.clone()
    chosen = _choose(model, source, include, exclude)
    layout = AdapterLayout(
        base_name=name,
        base_root=digest(source).root,
        rank=rank,
        slots=slots,
        dtype=template.dtype,
        optional=optional,
        exposed=tuple(Exposed(info=info, use=use_of(found)) for info, found in chosen),
    )
    surgery = Surgery(model, layout)
    for tensor, (_, found) in zip(layout.exposed, chosen, strict=True):
        surgery.expose(tensor, found)
    return replace(template, model=model, inputs=(*template.inputs, *ports(layout))), layout


def ports(layout: AdapterLayout) -> tuple[Port, ...]:
    """The inputs that a layout adds to a graph."""
    index = (Port(name=INDEX, dtype="int64", shape=("batch",)),) if layout.slots else ()
    factors = (Port(name=n, dtype=layout.dtype, shape=s) for n, s in layout.inputs.items())
    return (*index, *factors)


def _check_options(rank: int, slots: int) -> None:
    if not 1 <= rank <= MAX_RANK:
        raise InputError(f"rank {rank} is not from 1 to {MAX_RANK}", fix="8 is a usual rank")
    if not 0 <= slots <= MAX_SLOTS:
        raise InputError(
            f"{slots} slots are not from 0 to {MAX_SLOTS}", fix="0 for one fine-tune at a time"
        )


def _choose(
    model: Any, source: Checkpoint, include: Sequence[str], exclude: Sequence[str]
) -> list[tuple[TensorInfo, tuple[Site, ...]]]:
    """The weights to expose in name order, each with its uses."""
    infos = {name: source.info(name) for name in source.names}
    patterns = Patterns(include=tuple(include) or ("*",), exclude=tuple(exclude))
    there = model.graph.initializers
    found = [
        (infos[target.name], sites(there[target.name]) if target.name in there else ())
        for target in select(infos.values(), patterns)
    ]
    chosen = [(info, uses) for info, uses in found if include or is_layer(uses)]
    if not any(uses for _, uses in chosen):
        raise InputError(
            f"no weight that the outputs depend on matches {', '.join(include) or 'a layer'}",
            fix="`kilodelta inspect FILE` shows what a file changes; expose those",
        )
    return chosen
