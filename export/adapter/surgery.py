"""Adding low-rank updates to an `onnx_ir` graph, whose factors are inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir

from kilodelta.errors import ExportError
from kilodelta.export.adapter.layout import INDEX, AdapterLayout, Exposed
from kilodelta.export.adapter.sites import Site
from kilodelta.models.example_inputs import BATCH


class Surgery:
    """Changes one model in place: `expose` adds a tensor's two inputs, A and B, and joins their
    product to all its uses. With slots the input `adapter` comes first."""

    def __init__(self, model: Any, layout: AdapterLayout) -> None:
        self._graph, self._layout = model.graph, layout
        self._made = 0
        if layout.slots:
            self._index = self._input(INDEX, "int64", (BATCH,))

    def expose(self, tensor: Exposed, found: tuple[Site, ...]) -> None:
        """Add one tensor's inputs, and its update to every use.

        Raises:
            ExportError: the update cannot be chosen row by row, which slots need.
        """
        if tensor.use == "unused":
            return
        if self._layout.slots:
            for site in found:
                _require_rows(tensor, site)
        A, B = (self._factor(name) for name in tensor.names)
        for site in found:
            kind = "whole" if site.kind == "conv" and tensor.use != "conv" else site.kind
            _JOIN[kind](self, tensor, site, A, B)

    def linear(self, tensor: Exposed, site: Site, A: Any, B: Any) -> None:
        """y + (x A) B; where the factors lie for other uses, y + (x B^T) A^T."""
        if tensor.use == "straight" and site.turned:
            A, B = self._turned(site, B), self._turned(site, A)
        x = site.node.inputs[0]
        if self._layout.slots:
            A, B = self._chosen(site, A), self._chosen(site, B)
        if not self._layout.slots or len(x.shape) == 3:
            self._add(site, self._product(site, x, A, B))
        else:
            self._add(site, self._by_row(tensor, site, A, B))

    def _by_row(self, tensor: Exposed, site: Site, A: Any, B: Any) -> Any:
        """(x A) B of an x that is not (batch, rows, width), in whose order all of it lies."""
        x, width = site.node.inputs[0], tensor.info.shape[1 if site.turned else 0]
        batch = self._node(site, "Shape", [self._index])
        sizes = self._node(site, "Concat", [batch, self._whole_numbers(-1, width)], axis=0)
        update = self._product(site, self._node(site, "Reshape", [x, sizes]), A, B)
        lead = self._node(site, "Shape", [x], start=0, end=-1)
        sizes = self._node(site, "Concat", [lead, self._whole_numbers(-1)], axis=0)
        return self._node(site, "Reshape", [update, sizes])

    def rows(self, tensor: Exposed, site: Site, A: Any, B: Any) -> None:
        """y + A[ids] B."""
        ids = site.node.inputs[1]
        if self._layout.slots:
            A, ids = self._rows_of_all_slots(tensor, site, A, ids)
            B = self._chosen(site, B)
        picked = self._node(site, "Gather", [A, ids], axis=0)
        self._add(site, self._node(site, "MatMul", [picked, B]))

    def conv(self, tensor: Exposed, site: Site, A: Any, B: Any) -> None:
        """y + (x * A) * B: the convolution itself with few channels out, then one of size 1."""
        same = {name: attribute.value for name, attribute in site.node.attributes.items()}
        few = self._node(site, "Conv", [site.node.inputs[0], A], **same)
        self._add(site, self._node(site, "Conv", [few, B]))

    def whole(self, tensor: Exposed, site: Site, A: Any, B: Any) -> None:
        """W + A B instead of W."""
        update = self._node(site, "MatMul", [A, B])
        if len(tensor.info.shape) > 2:
            sizes = self._whole_numbers(*tensor.info.shape)
            update = self._node(site, "Reshape", [update, sizes])
        total = self._node(site, "Add", [site.node.inputs[site.index], update])
        site.node.replace_input_with(site.index, total)

    def _rows_of_all_slots(self, tensor: Exposed, site: Site, A: Any, ids: Any) -> tuple[Any, Any]:
        """The slots' tables under each other, and the ids that count from their tops."""
        rows, rank = tensor.info.shape[0], self._layout.rank
        table = self._node(site, "Reshape", [A, self._whole_numbers(-1, rank)])
        tops = self._node(site, "Mul", [self._index, self._whole_numbers(rows)])
        column = self._node(site, "Unsqueeze", [tops, self._whole_numbers(1)])
        return table, self._node(site, "Add", [ids, column])

    def _product(self, site: Site, x: Any, A: Any, B: Any) -> Any:
        """(x A) B"""
        return self._node(site, "MatMul", [self._node(site, "MatMul", [x, A]), B])

    def _turned(self, site: Site, factor: Any) -> Any:
        order = (0, 2, 1) if self._layout.slots else (1, 0)
        return self._node(site, "Transpose", [factor], perm=order)

    def _chosen(self, site: Site, factor: Any) -> Any:
        """A factor of each row's slot."""
        return self._node(site, "Gather", [factor, self._index], axis=0)

    def _add(self, site: Site, update: Any) -> None:
        """Put an addition behind a site; the sum takes the name where the graph puts it out."""
        y = site.node.outputs[0]
        total = self._value(y.dtype, y.shape)
        node = ir.node("Add", [y, update], outputs=[total])
        if y.is_graph_output():
            total.name, y.name = y.name, total.name
        y.replace_all_uses_with(total, replace_graph_outputs=True)
        node.replace_input_with(0, y)
        self._graph.insert_after(site.node, node)

    def _node(self, site: Site, kind: str, inputs: list[Any], **attributes: Any) -> Any:
        """A new node before a site; returns its output."""
        node = ir.node(kind, inputs, attributes, outputs=[self._value()])
        self._graph.insert_before(site.node, node)
        return node.outputs[0]

    def _value(self, dtype: Any = None, shape: Any = None) -> Any:
        self._made += 1
        kind = None if dtype is None else ir.TensorType(dtype)
        return ir.Value(name=f"adapter:{self._made}", type=kind, shape=shape)

    def _whole_numbers(self, *numbers: int) -> Any:
        """An int64 constant (n,)."""
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
        kind = ir.DataType[_DTYPES[dtype]]
        value = ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape))
        self._graph.inputs.append(value)
        return value


_DTYPES = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16", "int64": "INT64"}

_JOIN: Mapping[str, Callable[[Surgery, Exposed, Site, Any, Any], None]] = MappingProxyType(
    {
        "linear": Surgery.linear,
        "rows": Surgery.rows,
        "conv": Surgery.conv,
        "whole": Surgery.whole,
    }
)


def _require_rows(tensor: Exposed, site: Site) -> None:
    """See that a site computes the rows of a batch one after another."""
    place = {"linear": 0, "rows": 1}.get(site.kind)
    if place is None or not _leads_with_batch(site.node.inputs[place]):
        raise ExportError(
            f"{tensor.info.name} cannot differ from row to row of a batch: "
            f"{site.node.op_type} {site.node.name or site.node.outputs[0].name} uses it for all",
            fix="exclude it, or export without slots",
        )


def _leads_with_batch(value: Any) -> bool:
    """Whether the first axis is the batch, or was flattened from axes of which it is the first."""
    maker = value.producer()
    if maker is not None and maker.op_type == "Reshape" and len(value.shape or ()) == 2:
        value = maker.inputs[0]
    return bool(value.shape) and str(getattr(value.shape[0], "value", value.shape[0])) == BATCH
