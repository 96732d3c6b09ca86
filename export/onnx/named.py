"""Trace a graph whose weights bear their checkpoint names, each proved to be itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from kilodelta.errors import ExportError
from kilodelta.export.manifest.facts import Sizes
from kilodelta.export.onnx.clean import clean, rename
from kilodelta.export.onnx.proof import claim, make_twin, require_kept
from kilodelta.export.onnx.template import Template, port
from kilodelta.export.onnx.trace import trace
from kilodelta.files.checkpoint import in_name_order
from kilodelta.files.tying import first_names
from kilodelta.models import Batch, LoadedModel


@dataclass(frozen=True)
class NamedGraph:
    """A graph with named weights.

    Attributes:
        model: an `onnx_ir.Model` whose weights have no values.
        weights: their checkpoint names and shapes.
        frozen: by the name of an axis that torch could only trace at one size, why.
    """

    model: Any
    weights: Mapping[str, tuple[int, ...]]
    frozen: Mapping[str, str]

    def template(
        self, loaded: LoadedModel, dtype: str, sizes: Mapping[str, Sizes], notes: tuple[str, ...]
    ) -> Template:
        """Describe this graph of a model as a template.

        Args:
            loaded: the model that was traced.
            dtype: "float32", "float16" or "bfloat16".
            sizes: smallest, usual and largest size of every axis that varies, by name.
            notes: sentences on what is fixed although one might expect otherwise.
        """
        return Template(
            model=self.model,
            dtype=dtype,
            weights=MappingProxyType(self.weights),
            unused=tuple(n for n in loaded.names if n not in self.weights) + loaded.unused,
            inputs=tuple(map(port, self.model.graph.inputs)),
            outputs=tuple(map(port, self.model.graph.outputs)),
            opset=self.model.opset_imports[""],
            sizes=MappingProxyType(dict(sizes)),
            notes=notes,
        )


def named_graph(
    loaded: LoadedModel,
    view: Callable[[nn.Module], nn.Module],
    shown: Batch,
    axes: Mapping[str, Mapping[int, str]],
    dtype: str,
) -> NamedGraph:
    """Trace a view of a model's twin, and name the weights of the graph.

    Args:
        loaded: the model; its weights' values play no part.
        view: wraps the twin as a function from named tensors to named tensors, holding it as
            `module`.
        shown: inputs at the sizes to trace with, floats in any precision.
        axes: for each input the names of the axes that vary, by index.
        dtype: "float32", "float16" or "bfloat16".

    Raises:
        ExportError: torch cannot trace it, or a weight does not stay itself.
    """
    precision = getattr(torch, dtype)
    twin = make_twin(loaded.module, precision, loaded.computed)
    batch = {n: t.to(precision) if t.is_floating_point() else t for n, t in shown.items()}
    raw = trace(view(twin), batch, axes)
    claimed = claim(raw, twin, loaded.computed)
    clean(raw.model)
    require_kept(raw.model, claimed, claimed.keys() & raw.used)
    named = _by_checkpoint_name(loaded, twin, claimed)
    rename(raw.model, named)
    held = raw.model.graph.initializers
    return NamedGraph(
        model=raw.model,
        weights={n: tuple(held[n].shape.numpy()) for n in named if n in held},
        frozen=dict.fromkeys(raw.frozen, "the model's code fixes it while torch traces it"),
    )


def _by_checkpoint_name(
    loaded: LoadedModel, twin: nn.Module, claimed: Mapping[str, list[Any]]
) -> dict[str, list[Any]]:
    """The claimed values by checkpoint name, in name order."""
    firsts = first_names(twin.state_dict())
    owner = {firsts[place]: name for name, place in loaded.names.items()}
    orphans = sorted(set(claimed) - set(owner))
    if orphans:
        raise ExportError(
            f"no checkpoint holds {', '.join(orphans)}, which the outputs depend on",
            fix="give the merged model, or a delta that carries them as extras",
        )
    named = {owner[name]: values for name, values in claimed.items()}
    return {name: named[name] for name in in_name_order(named)}
