"""Trace a torch module into a raw ONNX graph, every weight a separate initializer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kilodelta.errors import ExportError, require
from kilodelta.export.onnx.rewritten import Rewritten
from kilodelta.export.onnx.translations import translations
from kilodelta.models import Batch
from kilodelta.models.quiet import quiet


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A graph as torch makes it.

    Attributes:
        model: an `onnx_ir.Model`.
        used: the state names that the outputs depend on, as torch sees it.
        frozen: the names of the axes that torch could only trace at one size.
    """

    model: Any
    used: frozenset[str]
    frozen: tuple[str, ...]


class Positional(nn.Module):
    """A view with positional inputs and a tuple of outputs, as exporters want it."""

    def __init__(
        self, view: nn.Module, inputs: tuple[str, ...], axes: Mapping[str, Mapping[int, str]]
    ) -> None:
        super().__init__()
        self.view, self.inputs = view, inputs
        self.axes = [axes[name] for name in inputs]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs, each a separate tensor."""
        self._unite(tensors)
        named = self.view(**dict(zip(self.inputs, tensors, strict=True)))
        # One tensor under two names, or an input or weight that is passed on, would otherwise be
        # one value of the graph, whose last name alone stays.
        return tuple(tensor.clone() for tensor in named.values())

    def _unite(self, tensors: tuple[Tensor, ...]) -> None:
        """Say at once that axes of one name have one size.

        torch gives every axis of every input a symbol. It would learn of their equality layer by
        layer, and reason about all of them meanwhile, which takes longer with every cache input.
        """
        sizes: dict[str, int] = {}
        for tensor, names in zip(tensors, self.axes, strict=True):
            for index, name in names.items():
                size = tensor.shape[index]
                is_same = sizes.setdefault(name, size) == size
                torch._check(is_same)  # type: ignore[no-untyped-call]


def trace(view: nn.Module, batch: Batch, axes: Mapping[str, Mapping[int, str]]) -> Trace:
    """Trace a view of a module.

    Args:
        view: takes and returns named tensors, and holds the module as `module`; in eval mode, in
            the precision to export.
        batch: inputs that the view takes, at the sizes to trace with.
        axes: for each input the names of the axes that vary, by index.

    Raises:
        ExportError: torch cannot trace the module.
    """
    require("onnxscript", extra="onnx", why="export ONNX models")
    # One object that is given for two inputs would be traced as one input.
    shown = {name: tensor.clone() for name, tensor in batch.items()}
    with torch.inference_mode(False), torch.no_grad(), quiet():
        names = list(view(**shown))
        with Rewritten():
            program = _export(Positional(view, tuple(shown), axes), shown, axes, names)
    exported = program.exported_program
    assert exported is not None  # `_export` has seen to it
    prefix = "view.module."
    used = {name.removeprefix(prefix) for name in _live(exported)}
    frozen = _name_axes(program.model, axes, _single(exported))
    return Trace(model=program.model, used=frozenset(used), frozen=frozen)


_PLACE = re.compile(r"Caused by: \((\S+:\d+) in ")
"""Where torch says that a decision is, such as `transformers/models/led/modeling_led.py:193`."""


def _export(
    module: Positional, batch: Batch, axes: Mapping[str, Mapping[int, str]], outputs: list[str]
) -> torch.onnx.ONNXProgram:
    # AUTO lets torch fix an axis that the module's code fixes, instead of failing.
    auto = torch.export.Dim.AUTO
    try:
        program = torch.onnx.export(
            module.eval(),
            tuple(batch.values()),
            input_names=list(batch),
            output_names=outputs,
            dynamic_shapes=(tuple(dict.fromkeys(axes[name], auto) for name in batch),),
            dynamo=True,
            optimize=False,
            verbose=False,
            custom_translation_table=translations(),
        )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(
            f"torch cannot export {type(module.view.module).__name__}: {_reason(error)}",
            fix="give a module without it by --model, or use the checkpoint that `kilodelta merge` "
            "writes",
        ) from error
    if program is None or program.exported_program is None:
        raise ExportError("torch exported nothing", fix="upgrade torch")
    return program


def _reason(error: BaseException) -> str:
    """Say what torch cannot trace, by the innermost cause: outer ones are the exporter's steps."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    place = _PLACE.search(text)
    if "data-dependent" in text and place is not None:
        return f"its forward decides by what its inputs hold, at {place[1]}"
    if text.startswith("Cannot swap"):
        return "its forward converts weights of its own (a module's .to)"
    return text or type(error).__name__


def _single(program: torch.export.ExportedProgram) -> set[str]:
    """Return the symbols of sizes that torch has found to have one possible value."""
    return {
        str(symbol)
        for symbol, values in program.range_constraints.items()
        if values.lower == values.upper
    }


def _name_axes(
    model: Any, axes: Mapping[str, Mapping[int, str]], single: set[str]
) -> tuple[str, ...]:
    """Replace torch's symbols of sizes (`s21`) by the axes' names, in all shapes of the graph.

    Returns:
        The names of the axes that are fixed in the graph.
    """
    import onnx_ir as ir

    names: dict[str, str] = {}
    frozen: set[str] = set()
    for value in model.graph.inputs:
        for index, name in axes[value.name].items():
            size = value.shape[index]
            symbol = "" if isinstance(size, int) else str(size.value)
            # An expression, or a symbol that torch has pinned to one value: the axis cannot vary.
            if not symbol.isidentifier() or symbol in single:
                frozen.add(name)
            else:
                names.setdefault(symbol, name)
    values = (*model.graph.inputs, *(v for node in model.graph.all_nodes() for v in node.outputs))
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([_named(size, names) for size in value.shape])
    return tuple(sorted(frozen))


def _named(size: Any, names: Mapping[str, str]) -> Any:
    """Name the symbols in a size: an int stays, `(s21 - 1)//2` becomes `(time - 1)//2`."""
    if isinstance(size, int) or size.value is None:
        return size
    return re.sub(r"[A-Za-z_]\w*", lambda found: names.get(found[0], found[0]), str(size.value))


def _live(program: torch.export.ExportedProgram) -> set[str]:
    """Return the parameters and buffers that the outputs of an exported program depend on."""
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
