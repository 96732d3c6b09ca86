"""Simplifying an exported graph without touching a weight.

torch's own optimisation renames, transposes and folds weights. Here they have no values while
constants are folded, so only shapes, masks and scales can be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kilodelta.errors import ExportError
from kilodelta.export.onnx.fourier import write_out_transforms


def clean(model: Any) -> None:
    """Inline functions, fold constants, write Fourier transforms as products, drop what is unused
    and all notes about the source."""
    import onnx_ir.passes.common as passes
    from onnxscript import optimizer

    optimizer.inline(model)
    optimizer.fold_constants(model)
    write_out_transforms(model)
    optimizer.remove_unused_nodes(model)
    passes.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    passes.RemoveUnusedOpsetsPass()(model)
    passes.ClearMetadataAndDocStringPass()(model)
    _drop_unused(model.graph)


def _drop_unused(graph: Any) -> None:
    outputs = set(graph.outputs)  # an output that depends on no input is an initializer itself
    unused = [n for n, v in graph.initializers.items() if not v.uses() and v not in outputs]
    for name in unused:
        del graph.initializers[name]


def rename(model: Any, weights: Mapping[str, list[Any]]) -> None:
    """Give weights their names; of several values for one weight, keep one.

    Raises:
        ExportError: an input or output bears the name of a weight.
    """
    graph = model.graph
    _make_room(graph, set(weights))
    for name, values in weights.items():
        kept = [value for value in values if graph.initializers.get(value.name) is value]
        for value in kept[1:]:
            value.replace_all_uses_with(kept[0])
            del graph.initializers[value.name]
        if kept:
            kept[0].name = name


def _make_room(graph: Any, names: set[str]) -> None:
    """Rename whatever else in the graph bears one of `names`."""
    for value in (*graph.inputs, *graph.outputs):
        if value.name in names:
            raise ExportError(
                f"{value.name} is the name of a weight and of an input or output",
                fix="rename the argument of the module's forward, or the output",
            )
    inner = [value for node in graph.all_nodes() for value in node.outputs]
    for value in (*graph.initializers.values(), *inner):
        if value.name in names:
            value.name = f"{value.name}:value"
