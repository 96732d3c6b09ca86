"""Find heads whose number of labels a graph need not fix.

Forty classifiers over one encoder have forty numbers of labels. Where a head is the last layer,
nothing behind it depends on that number, and its axis may stay open.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from kilodelta.export.adapter.sites import GraphSite, number, sites

LABELS = "labels"
"""The name of an open axis of labels."""


@dataclass(frozen=True, kw_only=True)
class HeadLayer:
    """A linear layer whose weight, and bias if it has one, fine-tunes bring.

    Attributes:
        weight: the `onnx_ir.Value` of W, two axes.
        bias: that of b, or nothing.
        site: where W is used.
        outputs: of the product, and of the sum with b where that is another node.
    """

    weight: Any
    bias: tuple[Any, ...]
    site: GraphSite
    outputs: tuple[Any, ...]


def find_layer(weight: Any, heads: Collection[Any]) -> HeadLayer | None:
    """Find the linear layer of a weight; None where it is used otherwise, or more than once.

    Args:
        weight: an initializer, an `onnx_ir.Value`.
        heads: the initializers that fine-tunes bring, of which a bias has to be one.
    """
    uses = sites(weight) if len(weight.shape) == 2 else ()
    if len(uses) != 1 or uses[0].kind != "linear":
        return None
    node = uses[0].node
    product = node.outputs[0]
    bias = tuple(value for value in node.inputs[2:] if value is not None)  # a Gemm's
    outputs = [product]
    if not bias and not product.is_graph_output() and len(product.uses()) == 1:
        ((adding, _),) = product.uses()
        addends = tuple(value for value in adding.inputs if value is not product)
        if adding.op_type == "Add" and all(value in heads for value in addends):
            bias = addends
            outputs.append(adding.outputs[0])
    if not all(v in heads and len(v.shape) == 1 and len(v.uses()) == 1 for v in bias):
        return None
    if bias and node.op_type == "Gemm" and number(node, "beta", 1) != 1:
        return None
    return HeadLayer(weight=weight, bias=bias, site=uses[0], outputs=tuple(outputs))


def free_heads(model: Any, heads: Collection[str]) -> frozenset[str]:
    """Open the axis of labels of heads that are last layers, in place.

    Such a head is one linear layer, W (labels, width) and perhaps a bias (labels,), whose sum is an
    output of the graph and feeds nothing else.

    Args:
        model: an `onnx_ir.Model`.
        heads: names of tensors that fine-tunes bring.

    Returns:
        The names of the tensors whose first axis is open now.
    """
    graph, free = model.graph, set[str]()
    values = {graph.initializers[name] for name in heads if name in graph.initializers}
    for weight in sorted(values, key=lambda value: str(value.name)):
        layer = find_layer(weight, values)
        if layer is None or not layer.site.turned:
            continue
        last = layer.outputs[-1]
        if not last.is_graph_output() or last.uses():
            continue
        axis = LABELS if len(graph.outputs) == 1 else f"{last.name}.{LABELS}"
        for value in (weight, *layer.bias):
            _open(value, 0, axis)
            free.add(value.name)
        for value in layer.outputs:
            _open(value, -1, axis)
    return frozenset(free)


def _open(value: Any, axis: int, name: str) -> None:
    """Give one axis of a value a name in place of its size."""
    import onnx_ir as ir

    if value.shape is not None:
        sizes = list(value.shape)
        sizes[axis] = ir.SymbolicDim(name)
        value.shape = ir.Shape(sizes)
