"""Find where an ONNX file departs from the module: the first layer whose output is off.

The export keeps parameter names, so a graph says which nodes belong to which layer: the last node
that takes a layer's parameters computes that layer's output. Those values become outputs of a copy
of the graph and are compared with the module's, which forward hooks record. The limit at each layer
follows the same rule as that of the whole model.

A value that is an output cannot be fused away. If nothing departs in the copy although the file
failed, the runtime's graph optimisation is the suspect.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kilodelta.errors import require
from kilodelta.verify.parity.gate import limit
from kilodelta.verify.parity.metrics import compare
from kilodelta.verify.parity.result import Departure
from kilodelta.verify.runners.onnx_runner import OnnxRunner
from kilodelta.verify.runners.runner import Arrays, Batch
from kilodelta.verify.runners.torch_runner import TorchRunner


@dataclass(frozen=True, kw_only=True)
class Stop:
    """A value in the graph that may be a layer's output, and the node that computes it."""

    layer: str
    node: str
    operator: str
    value: str


def first_departure(
    path: Path,
    merged: torch.nn.Module,
    batch: Batch,
    *,
    precision: str,
    device: str = "cpu",
    names: Mapping[str, str] = MappingProxyType({}),
) -> Departure | None:
    """Return the first layer whose output is off, in graph order; None if there is none.

    Args:
        path: the ONNX file.
        merged: the module that it was exported from.
        batch: inputs of a case that failed.
        precision: the file's precision.
        device: where both are computed, "cpu" or "cuda".
        names: the file's parameter names to the module's, where they differ.

    Raises:
        MissingPackageError: the `onnx` package is needed to look into the file.
        ProofError: the copy of the graph cannot be run.
    """
    onnx = require("onnx", extra="onnx", why="look inside an ONNX file")
    model = onnx.load(str(path), load_external_data=False)
    layers = {_layer(place): _layer(name) for name, place in names.items()}
    exact, plain = (
        {layers.get(layer, layer): value for layer, value in recorded.items()}
        for recorded in (_recorded(merged, batch, p, device) for p in ("float64", precision))
    )
    stops = [stop for stop in stops_of(model.graph) if stop.layer in exact]
    values = _values(onnx, model, stops, batch, path.parent, device)
    for stop in _outputs(stops, values, exact):
        departure = _judge(stop, values, exact, plain, precision)
        if departure is not None:
            return departure
    return None


def stops_of(graph: Any) -> list[Stop]:
    """Return every value computed from a layer's parameters and something else, in graph order."""
    owners = {tensor.name: {_layer(tensor.name)} for tensor in graph.initializer}
    constant = set(owners)
    stops = []
    for node in graph.node:
        layers = set().union(*(owners.get(name, set()) for name in node.input))
        if all(name in constant or not name for name in node.input):
            constant.update(node.output)
            owners.update({name: layers for name in node.output})
            continue
        stops += [_stop(layer, node) for layer in sorted(layers)]
    return stops


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _stop(layer: str, node: Any) -> Stop:
    return Stop(layer=layer, node=node.name, operator=node.op_type, value=node.output[0])


def _recorded(
    module: torch.nn.Module, batch: Batch, precision: str, device: str
) -> dict[str, NDArray[Any]]:
    """Return the outputs of layers without layers inside that are called once, as float64."""
    runner = TorchRunner(module, (), precision=precision, device=device)
    calls: dict[str, list[Any]] = {}
    with _hooks(runner.module, calls):
        runner.run(batch)
    single = {name: made[0] for name, made in calls.items() if len(made) == 1}
    return {
        name: value.detach().double().cpu().numpy()
        for name, value in single.items()
        if isinstance(value, torch.Tensor)
    }


@contextmanager
def _hooks(module: torch.nn.Module, calls: dict[str, list[Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, layer in module.named_modules():
            if not any(layer.children()):
                made = calls.setdefault(name, [])
                handle = layer.register_forward_hook(
                    lambda _layer, _inputs, output, made=made: made.append(output)
                )
                stack.callback(handle.remove)
        yield


def _values(
    onnx: Any, model: Any, stops: Sequence[Stop], batch: Batch, folder: Path, device: str
) -> Arrays:
    """Run a copy of the model that puts out the stops' values as well."""
    present = {output.name for output in model.graph.output}
    for name in dict.fromkeys(stop.value for stop in stops):
        if name not in present:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    return OnnxRunner(model.SerializeToString(), device=device, folder=folder).run(batch)


def _outputs(stops: Sequence[Stop], values: Arrays, exact: Arrays) -> list[Stop]:
    """Keep, of each layer, the last stop that has as many elements as the layer's output."""
    last = {stop.layer: stop for stop in stops if values[stop.value].size == exact[stop.layer].size}
    return [stop for stop in stops if last.get(stop.layer) is stop]


def _judge(
    stop: Stop, values: Arrays, exact: Arrays, plain: Arrays, precision: str
) -> Departure | None:
    reference = exact[stop.layer].ravel()
    error = compare(np.asarray(values[stop.value]).ravel(), reference)
    most = limit([compare(plain[stop.layer].ravel(), reference)], precision)
    if most.admits(error):
        return None
    return Departure(
        layer=stop.layer,
        node=stop.node,
        operator=stop.operator,
        relative_l2=error.relative_l2,
        limit=most.relative_l2,
    )
