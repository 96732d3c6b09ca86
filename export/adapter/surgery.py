"""Add low-rank updates, whose factors are inputs, to an `onnx_ir` graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir

from kilodelta.errors import ExportError
from kilodelta.export.adapter.heads import HeadLayer, find_layer
from kilodelta.export.adapter.layout import INDEX, AdapterLayout, Exposed, StoredInput
from kilodelta.export.adapter.sites import GraphSite
from kilodelta.export.manifest.facts import BATCH
from kilodelta.files.dtypes import BY_LONG, FLOATS
from kilodelta.files.tensor import RawTensor


class Surgery:
    """Changes one model in place: `expose` adds a tensor's two inputs, A and B, and joins their
    product to all its uses. With slots the input `adapter` comes first.

    The four ways to join (`linear`, `rows`, `conv`, `whole`) take the tensor, the use, and the
    graph's values of A and B in the shapes of `Exposed.shapes`, the axis of slots before them.
    """

    def __init__(self, model: Any, layout: AdapterLayout) -> None:
        self._graph, self._layout = model.graph, layout
        self._made = 0
        if layout.slots:
            self._index = self._input(INDEX, "int64", (BATCH,))

    def expose(self, tensor: Exposed, uses: tuple[GraphSite, ...]) -> None:
        """Add one tensor's inputs, and its update to every use.

        Raises:
            ExportError: the update cannot be chosen row by row, which slots need.
        """
        if tensor.use == "unused":
            return
        if self._layout.slots:
            for site in uses:
                _require_rows(tensor.info.name, site)
        A, B = (self._factor(name) for name in tensor.names)
        for site in uses:
            is_whole = tensor.use == "stack" or (site.kind == "conv" and tensor.use != "conv")
            kind = "whole" if is_whole else site.kind
            _JOIN[kind](self, tensor, site, A, B)

    def store(self, stored: Sequence[StoredInput]) -> None:
        """Make tensors inputs under their own names.

        Raises:
            ExportError: with slots, a tensor that cannot differ from row to row of a batch.
        """
        used = [one.info.name for one in stored if one.is_used]
        if self._layout.slots:
            self._store_by_row(used)
            return
        for name in used:
            value = self._graph.initializers[name]
            self._graph.inputs.append(value)
            if self._layout.optional:
                numbers = _numbers(self._layout.defaults[name], value.dtype)
                value.const_value = ir.tensor(numbers, dtype=value.dtype, name=name)
            else:
                del self._graph.initializers[name]

    def _store_by_row(self, names: Sequence[str]) -> None:
        """Make heads inputs of all slots, from which each row takes its own."""
        heads = {self._graph.initializers[name] for name in names}
        layers = [layer for value in heads if (layer := find_layer(value, heads)) is not None]
        alone = heads - {value for layer in layers for value in (layer.weight, *layer.bias)}
        if alone:
            name = min(value.name for value in alone)
            raise ExportError(
                f"{name} cannot differ from row to row of a batch: it is no linear head's",
                fix="leave it out of the tensors that are brought whole, or export without slots",
            )
        for layer in sorted(layers, key=lambda layer: layer.weight.name):
            self._head(layer)

    def _head(self, layer: HeadLayer) -> None:
        """Compute x W^T + b, with each row's own W and b."""
        site, x, y = layer.site, layer.site.node.inputs[0], layer.outputs[-1]
        _require_rows(layer.weight.name, site)
        weight, *bias = (self._slot_input(value) for value in (layer.weight, *layer.bias))

        def product(rows: Any) -> Any:
            W = self._chosen(site, weight)
            output = self._node(site, "MatMul", [rows, self._turned(site, W) if site.turned else W])
            for b in bias:
                row = self._node(site, "Unsqueeze", [self._chosen(site, b), self._whole_numbers(1)])
                output = self._node(site, "Add", [output, row])
            return output

        width = int(layer.weight.shape[1 if site.turned else 0])
        found = product(x) if len(x.shape) == 3 else self._by_row(site, width, product)
        found.dtype, found.shape = y.dtype, y.shape
        if y.is_graph_output():
            found.name, y.name = y.name, f"{y.name}:base"
        y.replace_all_uses_with(found, replace_graph_outputs=True)
        self._graph.remove([value.producer() for value in layer.outputs[::-1]], safe=True)
        for node, _ in layer.weight.uses():  # a transposition in front of the product
            self._graph.remove(node, safe=True)
        for value in (layer.weight, *layer.bias):
            del self._graph.initializers[value.name]

    def _slot_input(self, value: Any) -> Any:
        """Add an input that holds a tensor of every slot; it takes the tensor's name."""
        name = value.name
        value.name = f"{name}:base"
        shape = (*self._layout.lead, *value.shape.numpy())
        made = ir.Value(name=name, type=ir.TensorType(value.dtype), shape=ir.Shape(shape))
        self._graph.inputs.append(made)
        return made

    def linear(self, tensor: Exposed, site: GraphSite, A: Any, B: Any) -> None:
        """Add (x A) B to y; where the factors lie for other uses, (x B^T) A^T.

        Args:
            tensor: what is exposed.
            site: one use of it.
            A: the graph's value of the first factor.
            B: that of the second.
        """
        if tensor.use == "straight" and site.turned:
            A, B = self._turned(site, B), self._turned(site, A)
        x = site.node.inputs[0]
        if self._layout.slots:
            A, B = self._chosen(site, A), self._chosen(site, B)
        if not self._layout.slots or len(x.shape) == 3:
            self._add(site, self._product(site, x, A, B))
        else:
            width = tensor.info.shape[1 if site.turned else 0]
            update = self._by_row(site, width, lambda rows: self._product(site, rows, A, B))
            self._add(site, update)

    def _by_row(self, site: GraphSite, width: int, compute: Callable[[Any], Any]) -> Any:
        """Compute with an x that is not (batch, rows, width) as if it were."""
        x = site.node.inputs[0]
        batch = self._node(site, "Shape", [self._index])
        sizes = self._node(site, "Concat", [batch, self._whole_numbers(-1, width)], axis=0)
        output = compute(self._node(site, "Reshape", [x, sizes]))
        lead = self._node(site, "Shape", [x], start=0, end=-1)
        sizes = self._node(site, "Concat", [lead, self._whole_numbers(-1)], axis=0)
        return self._node(site, "Reshape", [output, sizes])

    def rows(self, tensor: Exposed, site: GraphSite, A: Any, B: Any) -> None:
        """Add A[ids] B to y.

        Args:
            tensor: what is exposed.
            site: one use of it.
            A: the graph's value of the first factor.
            B: that of the second.
        """
        ids = site.node.inputs[1]
        if self._layout.slots:
            A, ids = self._rows_of_all_slots(tensor, site, A, ids)
            B = self._chosen(site, B)
        picked = self._node(site, "Gather", [A, ids], axis=0)
        self._add(site, self._node(site, "MatMul", [picked, B]))

    def conv(self, tensor: Exposed, site: GraphSite, A: Any, B: Any) -> None:
        """Add (x * A) * B to y: the convolution itself with few channels out, then one of size 1.

        Args:
            tensor: what is exposed.
            site: one use of it.
            A: the graph's value of the first factor.
            B: that of the second.
        """
        same = {name: attribute.value for name, attribute in site.node.attributes.items()}
        few = self._node(site, "Conv", [site.node.inputs[0], A], **same)
        self._add(site, self._node(site, "Conv", [few, B]))

    def whole(self, tensor: Exposed, site: GraphSite, A: Any, B: Any) -> None:
        """Use W + A B instead of W.

        Args:
            tensor: what is exposed.
            site: one use of it.
            A: the graph's value of the first factor.
            B: that of the second.
        """
        update = self._node(site, "MatMul", [A, B])
        if len(tensor.info.shape) > 2 and tensor.use != "stack":
            sizes = self._whole_numbers(*tensor.info.shape)
            update = self._node(site, "Reshape", [update, sizes])
        total = self._node(site, "Add", [site.node.inputs[site.index], update])
        site.node.replace_input_with(site.index, total)

    def _rows_of_all_slots(
        self, tensor: Exposed, site: GraphSite, A: Any, ids: Any
    ) -> tuple[Any, Any]:
        """Stack the slots' tables, and shift the ids to where each row's table begins."""
        rows, rank = tensor.info.shape[0], self._layout.rank
        table = self._node(site, "Reshape", [A, self._whole_numbers(-1, rank)])
        tops = self._node(site, "Mul", [self._index, self._whole_numbers(rows)])
        column = self._node(site, "Unsqueeze", [tops, self._whole_numbers(1)])
        return table, self._node(site, "Add", [ids, column])

    def _product(self, site: GraphSite, x: Any, A: Any, B: Any) -> Any:
        """Compute (x A) B."""
        return self._node(site, "MatMul", [self._node(site, "MatMul", [x, A]), B])

    def _turned(self, site: GraphSite, factor: Any) -> Any:
        order = (0, 2, 1) if self._layout.slots else (1, 0)
        return self._node(site, "Transpose", [factor], perm=order)

    def _chosen(self, site: GraphSite, factor: Any) -> Any:
        """Pick the factor of each row's slot."""
        return self._node(site, "Gather", [factor, self._index], axis=0)

    def _add(self, site: GraphSite, update: Any) -> None:
        """Put an addition behind a site; the sum takes the name where the graph puts it out."""
        y = site.node.outputs[0]
        total = self._value(y.dtype, y.shape)
        node = ir.node("Add", [y, update], outputs=[total])
        if y.is_graph_output():
            total.name, y.name = y.name, total.name
        y.replace_all_uses_with(total, replace_graph_outputs=True)
        node.replace_input_with(0, y)  # it was among the uses that now read the sum
        self._graph.insert_after(site.node, node)

    def _node(self, site: GraphSite, kind: str, inputs: list[Any], **attributes: Any) -> Any:
        """Insert a node before a site, and return its output."""
        node = ir.node(kind, inputs, attributes, outputs=[self._value()])
        self._graph.insert_before(site.node, node)
        return node.outputs[0]

    def _value(self, dtype: Any = None, shape: Any = None) -> Any:
        self._made += 1
        kind = None if dtype is None else ir.TensorType(dtype)
        return ir.Value(name=f"adapter:{self._made}", type=kind, shape=shape)

    def _whole_numbers(self, *numbers: int) -> Any:
        """Add an int64 constant (n,)."""
        value = self._value()
        value.const_value = ir.tensor(np.array(numbers, np.int64), name=value.name)
        self._graph.register_initializer(value)
        return value

    def _factor(self, name: str) -> Any:
        value = self._input(name, self._layout.dtype, self._layout.inputs[name])
        if self._layout.optional:
            zeros = np.zeros(value.shape.numpy(), value.dtype.numpy())
            value.const_value = ir.tensor(zeros, dtype=value.dtype, name=name)
            self._graph.register_initializer(value)
        return value

    def _input(self, name: str, dtype: str, shape: tuple[int | str, ...]) -> Any:
        kind = ir.DataType[BY_LONG[dtype].onnx]
        value = ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape))
        self._graph.inputs.append(value)
        return value


def _numbers(tensor: RawTensor, dtype: Any) -> Any:
    """Return a tensor's values in an ONNX dtype, to nearest even."""
    if tensor.dtype not in FLOATS:
        return tensor.values()
    return FLOATS[tensor.dtype].widen(tensor.data).reshape(tensor.shape).astype(dtype.numpy())


_JOIN: Mapping[str, Callable[[Surgery, Exposed, GraphSite, Any, Any], None]] = MappingProxyType(
    {
        "linear": Surgery.linear,
        "rows": Surgery.rows,
        "conv": Surgery.conv,
        "whole": Surgery.whole,
    }
)


def _require_rows(name: str, site: GraphSite) -> None:
    """See that a site computes the rows of a batch one after another."""
    place = {"linear": 0, "rows": 1}.get(site.kind)
    if place is None or not _leads_with_batch(site.node.inputs[place]):
        raise ExportError(
            f"{name} cannot differ from row to row of a batch: "
            f"{site.node.op_type} {site.node.name or site.node.outputs[0].name} uses it for all",
            fix="exclude it, or export without slots",
        )


def _leads_with_batch(value: Any) -> bool:
    """Return whether the first axis is the batch, or was flattened from axes that begin with it."""
    maker = value.producer()
    if maker is not None and maker.op_type == "Reshape" and len(value.shape or ()) == 2:
        value = maker.inputs[0]
    return bool(value.shape) and str(getattr(value.shape[0], "value", value.shape[0])) == BATCH
