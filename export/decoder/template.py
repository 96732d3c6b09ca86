"""Make the graph of a causal language model with a cache: one graph for prompts and steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import torch

from kilodelta.errors import ExportError, InputError
from kilodelta.export.decoder.trial import try_steps
from kilodelta.export.manifest.facts import BATCH, DTYPES, PAST_SEQUENCE, SEQUENCE, Sizes
from kilodelta.export.onnx.named import NamedGraph, named_graph
from kilodelta.export.onnx.template import Template, port
from kilodelta.export.onnx.trial import can_try, open_graph
from kilodelta.models import LoadedModel
from kilodelta.models.generation.cache import (
    PAST,
    CachedStep,
    CacheLayer,
    cache_layers,
    empty_cache,
    feeds,
)

TOTAL_SEQUENCE = "total_sequence"
"""The axis of `attention_mask`: `past_sequence` and `sequence` together."""

_LONGEST = 512
"""Tokens that a profile goes up to by default."""
_ROWS, _NEW, _PAST = 3, 7, 5
"""Sizes to trace with: more than one, and unlike each other, so that none looks constant."""


def cached_template(
    loaded: LoadedModel, *, dtype: str = "float32", sizes: Mapping[str, Sizes] | None = None
) -> Template:
    """Export the architecture of a causal language model with its cache.

    Args:
        loaded: what to export; its weights' values serve to try the graph.
        dtype: the precision of weights, cache and arithmetic.
        sizes: smallest, usual and largest size of `batch`, `sequence` and `past_sequence`.

    Raises:
        ExportError: the model keeps something else between steps than keys and values, torch
            cannot export it, or the graph does not compute it at other sizes.
        InputError: an unknown dtype, or sizes that do not fit the model.
        MissingPackageError: onnxscript is not installed.

    Example:
        >>> cached_template(open_model("llama/")).outputs[0].name  # doctest: +SKIP
        'logits'
    """
    if dtype not in DTYPES:
        raise InputError(f"{dtype} is no precision to export in", fix=f"give {', '.join(DTYPES)}")
    chosen = _sizes(loaded, sizes or {})
    layers = cache_layers(loaded)
    graph = _graph(loaded, layers, dtype)
    notes: tuple[str, ...] = ()
    if can_try(dtype):
        session = open_graph(graph.model, loaded, graph.weights, getattr(torch, dtype))
        try_steps(session, loaded, layers, dtype)
    else:
        notes = (f"{dtype} was not run: onnxruntime is not installed, or does not compute in it",)
    made = Template(
        model=graph.model,
        dtype=dtype,
        weights=MappingProxyType(graph.weights),
        unused=tuple(n for n in loaded.names if n not in graph.weights) + loaded.unused,
        inputs=tuple(map(port, graph.model.graph.inputs)),
        outputs=tuple(map(port, graph.model.graph.outputs)),
        opset=graph.model.opset_imports[""],
        sizes=MappingProxyType(chosen),
        notes=notes,
    )
    return _with_total(made)


def _sizes(loaded: LoadedModel, given: Mapping[str, Sizes]) -> dict[str, Sizes]:
    """The sizes of every axis; prompt and new tokens together stay within the model's positions."""
    unknown = sorted(given.keys() - {BATCH, SEQUENCE, PAST_SEQUENCE})
    if unknown:
        raise InputError(
            f"a graph with a cache has no axis {unknown[0]} to size",
            fix=f"give {BATCH}, {SEQUENCE} or {PAST_SEQUENCE}",
        )
    top = min(loaded.max_length or _LONGEST, _LONGEST)
    sequence = given.get(SEQUENCE, (1, min(64, top), top))
    # A cache of the longest text leaves room for one token more.
    past = given.get(PAST_SEQUENCE, (0, min(64, top - 1), top - 1))
    for name, (_, _, high) in ((SEQUENCE, sequence), (PAST_SEQUENCE, past)):
        if loaded.max_length is not None and high > loaded.max_length:
            raise InputError(
                f"{name} {high} is beyond the {loaded.max_length} positions of {loaded.source}",
                fix=f"give {name} up to {loaded.max_length}",
            )
    total = (sequence[0] + past[0], sequence[1] + past[1], sequence[2] + past[2])
    return {
        BATCH: given.get(BATCH, (1, 1, 8)),
        SEQUENCE: sequence,
        PAST_SEQUENCE: past,
        TOTAL_SEQUENCE: total,
    }


def _graph(loaded: LoadedModel, layers: tuple[CacheLayer, ...], dtype: str) -> NamedGraph:
    ids = torch.zeros(_ROWS, _NEW, dtype=torch.long)
    mask = torch.ones(_ROWS, _PAST + _NEW, dtype=torch.long)
    shown = feeds(loaded.module, ids, mask, empty_cache(layers, _ROWS, _PAST))
    axes = {name: _axes(name) for name in shown}
    graph = named_graph(loaded, CachedStep, shown, axes, dtype)
    # torch may express the mask's axis by the other two, which is what it is.
    frozen = sorted(graph.frozen.keys() - {TOTAL_SEQUENCE})
    if frozen:
        raise ExportError(
            f"{type(loaded.module).__name__} of {loaded.source} cannot be exported with a cache: "
            f"its code fixes {', '.join(frozen)}",
            fix="export it without --kv-cache",
        )
    return graph


def _axes(name: str) -> dict[int, str]:
    if name.startswith(f"{PAST}."):
        return {0: BATCH, 2: PAST_SEQUENCE}
    return {0: BATCH, 1: TOTAL_SEQUENCE if name == "attention_mask" else SEQUENCE}


def _with_total(template: Template) -> Template:
    """Name the mask's axis in the graph and in the ports."""
    import onnx_ir as ir

    for value in template.model.graph.inputs:
        if value.name == "attention_mask":
            value.shape = ir.Shape([BATCH, TOTAL_SEQUENCE])
    return replace(template, inputs=tuple(map(port, template.model.graph.inputs)))
