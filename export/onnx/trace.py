"""From a torch module to a raw ONNX graph, every weight an initializer of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kilodelta.errors import ExportError, require
from kilodelta.models import Batch, View
from kilodelta.models.example_inputs import BATCH, SEQUENCE
from kilodelta.models.quiet import quiet

Axes = dict[int, str]

_SIZES = {BATCH: 3, SEQUENCE: 7}
"""Sizes to trace with: more than one, and unlike each other, so that none looks constant."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A raw `onnx_ir.Model`, and the state names that its outputs depend on, as torch sees it."""

    model: Any
    used: frozenset[str]


class Positional(nn.Module):
    """A view with positional inputs and a tuple of outputs, as exporters want it."""

    def __init__(self, view: View, inputs: tuple[str, ...]) -> None:
        super().__init__()
        self.view, self.inputs = view, inputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        named = self.view(**dict(zip(self.inputs, tensors, strict=True)))
        # A copy of each: one tensor under two names, or an input or weight that is passed on,
        # would otherwise be one graph value, whose last name alone stays.
        return tuple(tensor.clone() for tensor in named.values())


def trace(view: View, batch: Batch, axes: dict[str, Axes]) -> Trace:
    """Trace a view of a module.

    Args:
        view: in eval mode, in the precision to export.
        batch: inputs that the view takes; the axes named in `axes` are brought to other sizes.
        axes: for each input the axes that vary, by name.

    Raises:
        ExportError: torch cannot trace the module, or an axis cannot vary.
    """
    require("onnxscript", extra="onnx", why="export ONNX models")
    shown = {name: _resized(tensor, axes[name]) for name, tensor in batch.items()}
    with torch.inference_mode(False), torch.no_grad(), quiet():
        names = list(view(**shown))
        program = _export(Positional(view, tuple(shown)), shown, axes, names)
    prefix = "view.module."
    assert program.exported_program is not None  # `_export` has seen to it
    used = {name.removeprefix(prefix) for name in _live(program.exported_program)}
    return Trace(model=program.model, used=frozenset(used))


def _resized(tensor: Tensor, axes: Axes) -> Tensor:
    """The tensor with its varying axes cut, or repeated, to the sizes to trace with."""
    for axis, name in axes.items():
        size = _SIZES.get(name, tensor.shape[axis])
        tensor = tensor.index_select(axis, torch.arange(size) % tensor.shape[axis])
    return tensor


def _export(
    module: Positional, batch: Batch, axes: dict[str, Axes], outputs: list[str]
) -> torch.onnx.ONNXProgram:
    try:
        program = torch.onnx.export(
            module.eval(),
            tuple(batch.values()),
            input_names=list(batch),
            output_names=outputs,
            dynamic_shapes=(tuple(axes[name] for name in batch),),
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(
            f"torch cannot export {type(module.view.module).__name__}: {_reason(error)}",
            fix="rewrite what the message names, without control flow that depends on the data",
        ) from error
    if program is None or program.exported_program is None:
        raise ExportError("torch exported nothing", fix="upgrade torch")
    return program


def _reason(error: BaseException) -> str:
    """The innermost cause's message: the outer ones describe the exporter's own steps."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip() or type(error).__name__


def _live(program: torch.export.ExportedProgram) -> set[str]:
    """The parameters and buffers that the outputs of an exported program depend on."""
    signature = program.graph_signature
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    seen: set[torch.fx.Node] = set()
    waiting = [node for node in program.graph.nodes if node.op == "output"]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting.extend(node.all_input_nodes)
    return {held[node.name] for node in seen if node.name in held}
