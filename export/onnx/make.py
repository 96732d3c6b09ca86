"""Make a template: trace the model, prove its weights, and see that its axes vary as declared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from kilodelta.errors import ExportError, InputError
from kilodelta.export.manifest.facts import BATCH, DTYPES, Sizes
from kilodelta.export.onnx.axes import AxisGroup, Variation, vary
from kilodelta.export.onnx.named import NamedGraph, named_graph
from kilodelta.export.onnx.template import Template
from kilodelta.export.onnx.trial import GraphTrial, can_try
from kilodelta.models import Batch, LoadedModel, View, example


def export_template(
    loaded: LoadedModel,
    batch: Batch | None = None,
    *,
    dtype: str = "float32",
    sizes: Mapping[str, Sizes] | None = None,
) -> Template:
    """Export a model's architecture; its weights' values play no part.

    Axes vary where the model and the exported graph take other sizes (`axes/`, `trial.py`);
    `Template.notes` says what is fixed.

    Args:
        loaded: what to export.
        batch: inputs the model takes. Only their names, dtypes and fixed sizes matter; token
            models and images of a known size need none.
        dtype: the precision of weights and arithmetic. Casts that the model itself makes stay:
            most normalise and take softmax in float32.
        sizes: smallest, usual and largest size of axes by name. Images vary in `height` and
            `width` only where they are named here.

    Raises:
        ExportError: torch cannot export it, a weight does not stay itself, the graph does not
            compute the model, or an axis of `sizes` cannot vary in it.
        InputError: an unknown dtype, no batch where one is needed, or a size that the model does
            not take.
        MissingPackageError: onnxscript is not installed.

    Example:
        >>> export_template(open_model("base/")).inputs  # doctest: +SKIP
        (Port(name='input_ids', dtype='int64', shape=('batch', 'sequence')), ...)
    """
    if dtype not in DTYPES:
        raise InputError(f"{dtype} is no precision to export in", fix=f"give {', '.join(DTYPES)}")
    by_hand = sizes or {}
    variation = vary(loaded, example(loaded) if batch is None else batch, by_hand)
    return _Maker(loaded, dtype, by_hand, is_made_up=batch is None).run(variation)


@dataclass(frozen=True)
class _Maker:
    """Traces, tries, and fixes axes that do not vary in the graph, until what is declared holds.

    `is_made_up` says that nobody has said how large the inputs are.
    """

    loaded: LoadedModel
    dtype: str
    by_hand: Mapping[str, Sizes]
    is_made_up: bool

    def run(self, variation: Variation) -> Template:
        retraced: set[str] = set()
        while True:
            try:
                graph = self._graph(variation)
            except ExportError as error:
                variation = self._without_axes(variation, error)
                continue
            wrong = graph.frozen or self._tried(graph, variation)
            if not wrong:
                return self._template(graph, variation)
            for name, reason in wrong.items():
                group = variation.group(name)
                larger = group.sizes[2] - 1
                if name in graph.frozen or name in retraced or group.traced >= larger:
                    variation = self._fixed(variation, group, reason)
                else:  # a small size may take a branch of its own, where a large one is general
                    variation = variation.retraced(name, larger)
                    retraced.add(name)

    def _graph(self, variation: Variation) -> NamedGraph:
        shown = variation.resized({group.name: group.traced for group in variation.groups})

        def view(twin: nn.Module) -> View:
            return View(twin, self.loaded.pooling, self.loaded.chosen)

        return named_graph(self.loaded, view, shown, variation.axes(), self.dtype)

    def _without_axes(self, variation: Variation, error: ExportError) -> Variation:
        """Fix all but the batch, which leaves what torch may be able to trace.

        Raises:
            ExportError: `error` itself, where nothing is left to fix or what varies was asked for.
        """
        groups = [group for group in variation.groups if group.name != BATCH]
        if not groups or any(group.name in self.by_hand for group in groups):
            raise error
        for group in groups:
            variation = self._fixed(variation, group, error.what)
        return variation

    def _tried(self, graph: NamedGraph, variation: Variation) -> Mapping[str, str]:
        if not can_try(self.dtype):
            return {}
        dtype = getattr(torch, self.dtype)
        return GraphTrial(graph.model, self.loaded, graph.weights, variation, dtype).guilty()

    def _fixed(self, variation: Variation, group: AxisGroup, reason: str) -> Variation:
        """Fix an axis at the size that the inputs have, or that was asked for."""
        asked = self.by_hand.get(group.name)
        if asked is not None and len(set(asked)) > 1:
            raise ExportError(
                f"{group.name} cannot vary in the exported graph: {reason}",
                fix=f"leave {group.name} out of --profile, or give one size three times; it is "
                "then fixed",
            )
        size = group.given if asked is None and not self.is_made_up else group.sizes[1]
        return variation.fix(group.name, size, reason)

    def _template(self, graph: NamedGraph, variation: Variation) -> Template:
        untried = (
            f"{self.dtype} was not run at other sizes: onnxruntime is not installed, or its CPU "
            "kernels do not compute in it"
        )
        sizes = {group.name: group.sizes for group in variation.groups}
        notes = variation.fixed if can_try(self.dtype) else (*variation.fixed, untried)
        return graph.template(self.loaded, self.dtype, sizes, notes)
