"""Put codes into a float graph: each quantised weight becomes constants of an ONNX operator.

Two forms. `qdq` puts one `DequantizeLinear` in a weight's place, and every reader of it stays as it
is, an embedding and the head tied to it among them; TensorRT takes this form alone. `matmulnbits`
makes one `MatMulNBits` of each product with a weight that is nothing but a factor of products,
which ONNX Runtime computes without unpacking the matrix; what that operator does not take becomes
`qdq`.

ONNX Runtime may fuse `DequantizeLinear` and `MatMul` into a product with activations rounded to
int8. It does not where a `Transpose` stands between them (1.32), as it does in graphs of torch.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from kilodelta.errors import InputError
from kilodelta.export.quantised.constants import (
    Constant,
    Constants,
    block_sums,
    dequantize_linear,
    fits_nbits,
    matmul_nbits,
    require_exact,
    require_no_minima,
)
from kilodelta.grid.matrix import Matrix

AUTO, QDQ, NBITS = "auto", "qdq", "matmulnbits"
FORMS = (AUTO, QDQ, NBITS)
OPSET, OPSET_OF_E2M1 = 21, 23
"""The first with INT4 and with blocks, and the first with FLOAT4E2M1."""
_IR = {OPSET: 10, OPSET_OF_E2M1: 11}
"""The version of ONNX's file format that has the types of an opset."""
_DOMAIN = "com.microsoft"


def settled(form: str, *, for_engines: bool) -> str:
    """Return the form to write: of `auto` the one that suits what the graph is for.

    Args:
        form: one of `FORMS`.
        for_engines: whether TensorRT engines are built from the graph.

    Raises:
        InputError: it is none of them, or MatMulNBits is asked for engines.
    """
    if form not in FORMS:
        raise InputError(f"{form!r:.40} is no form of blocks", fix=f"give {', '.join(FORMS)}")
    if for_engines and form == NBITS:
        raise InputError(
            "TensorRT does not parse MatMulNBits, an operator of ONNX Runtime",
            fix="leave --blocks out, or give --blocks qdq",
        )
    return (QDQ if for_engines else NBITS) if form == AUTO else form


class Weights(Protocol):
    """Quantised weights by name, such as a `QuantisedModel`."""

    @property
    def stored(self) -> Mapping[str, object]: ...

    def matrix(self, name: str) -> Matrix: ...


def put_codes(
    model: Any,
    merged: Weights,
    *,
    form: str,
    dtype: str,
    leave: Container[str] = (),
) -> tuple[str, ...]:
    """Replace the quantised weights of a filled graph, in place.

    Args:
        model: an `onnx_ir.Model`, such as `fill_template` gives, with weights by their names.
        merged: the quantised model, whose codes the graph gets.
        form: `qdq` or `matmulnbits`.
        dtype: what the graph computes in.
        leave: names of weights that stay floats: heads in the place of quantised ones.

    Returns:
        the names of the weights that were replaced.

    Raises:
        ExportError: the graph cannot hold a weight exactly.
    """
    held = model.graph.initializers
    names = tuple(name for name in merged.stored if name in held and name not in leave)
    has_e2m1 = any(merged.matrix(name).kind.name == "e2m1" for name in names)
    _raise_opset(model, OPSET_OF_E2M1 if has_e2m1 else OPSET)
    for name in names:
        matrix = merged.matrix(name)
        require_exact(name, matrix, dtype)
        value = held[name]
        products = list(_products(value)) if form == NBITS and dtype != "bfloat16" else []
        if products and None not in products and fits_nbits(matrix):
            _multiply(model, name, matrix, products, dtype)
        else:
            require_no_minima(name, matrix)
            _dequantise(model, value, dequantize_linear(matrix, dtype), matrix)
        _drop(model.graph, value)
    return names


def _raise_opset(model: Any, opset: int) -> None:
    """Bring a graph to an opset that has the types; its other operators mean the same there."""
    from onnxscript import version_converter

    if model.opset_imports[""] < opset:
        version_converter.convert_version(model, opset)
    model.ir_version = max(model.ir_version, _IR[opset])


def _products(value: Any) -> Iterator[Any]:
    """Yield the nodes that multiply by a weight's transpose; None for any other use of it."""
    for use in value.uses():
        node = use.node
        if node.op_type == "Gemm" and use.idx == 1 and _is_plain(node):
            yield node
        elif node.op_type == "Transpose" and _is_swap(node):
            for inner in node.outputs[0].uses():
                is_product = inner.node.op_type == "MatMul" and inner.idx == 1
                yield inner.node if is_product else None
            if node.outputs[0].is_graph_output():
                yield None
        else:
            yield None


def _is_swap(node: Any) -> bool:
    return "perm" not in node.attributes or list(node.attributes["perm"].as_ints()) == [1, 0]


def _is_plain(node: Any) -> bool:
    """Return whether a Gemm is x W^T + b and nothing else."""
    given = {name: attribute.value for name, attribute in node.attributes.items()}
    plain = {"transA": 0, "transB": 1, "alpha": 1.0, "beta": 1.0}
    defaults = {"transA": 0, "transB": 0, "alpha": 1.0, "beta": 1.0}
    return {**defaults, **given} == plain


def _multiply(model: Any, name: str, matrix: Matrix, products: list[Any], dtype: str) -> None:
    """Replace products by `MatMulNBits`, which share one weight's constants."""
    import onnx_ir as ir

    made = matmul_nbits(matrix, dtype)
    model.opset_imports.setdefault(_DOMAIN, 1)
    inputs = _register(model.graph, f"{name}_Q{matrix.kind.bits}", name, made)
    for node in products:
        old, x = node.outputs[0], node.inputs[0]
        nodes = [ir.node("MatMulNBits", [x, *inputs], made.attributes, domain=_DOMAIN)]
        if made.minima is not None:
            product = nodes[0].outputs[0]
            nodes += _minima(model.graph, name, made.minima, x, matrix, dtype)
            nodes.append(ir.node("Add", [product, nodes[-1].outputs[0]]))
        if node.op_type == "Gemm" and len(node.inputs) > 2:
            nodes.append(ir.node("Add", [nodes[-1].outputs[0], node.inputs[2]]))
        result = nodes[-1].outputs[0]
        result.name, result.shape, result.type = old.name, old.shape, old.type
        ir.convenience.replace_nodes_and_values(node.graph, node, [node], nodes, [old], [result])


def _minima(
    graph: Any, name: str, minima: Constant, x: Any, matrix: Matrix, dtype: str
) -> list[Any]:
    """Return the nodes of what minima add to a product: the sum of x over each block, times them.

    With m the minimum of block b, the sum over its columns of m x is m times the sum of x there.

    Args:
        graph: which gets the constants.
        name: the weight's.
        minima: (blocks, out).
        x: the product's other factor.
        matrix: the weight.
        dtype: what the graph computes in.
    """
    import onnx_ir as ir

    columns, group = matrix.shape[1], min(matrix.block[1], matrix.shape[1])
    label = f"kilodelta_blocks_{columns}_{group}_{minima.type}"
    if label not in graph.initializers:  # shared by all weights of so many columns
        graph.register_initializer(_value(label, block_sums(columns, group, dtype)))
    if f"{name}_minima" not in graph.initializers:
        graph.register_initializer(_value(f"{name}_minima", minima))
    sums = ir.node("MatMul", [x, graph.initializers[label]])
    held = graph.initializers[f"{name}_minima"]
    return [sums, ir.node("MatMul", [sums.outputs[0], held])]


def _dequantise(model: Any, value: Any, made: Constants, matrix: Matrix) -> None:
    """Put one `DequantizeLinear` between a weight's codes and all its readers."""
    import onnx_ir as ir

    name, graph = value.name, model.graph
    inputs = _register(graph, f"{name}_DQ_Q{matrix.kind.bits}", name, made)
    if made.whole is not None:
        whole = _value(f"{name}_scale_of_scales", made.whole)
        graph.register_initializer(whole)
        inner = ir.node("DequantizeLinear", [inputs[1], whole])
        inner.outputs[0].name = f"{name}_scales_dequantized"
        graph.insert_before(graph[0], inner)
        inputs[1] = inner.outputs[0]
    result = ir.Value(name=f"{name}_dequantized", shape=value.shape, type=value.type)
    node = ir.node("DequantizeLinear", inputs, made.attributes, outputs=[result])
    if made.whole is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(inner, node)
    value.replace_all_uses_with(result, replace_graph_outputs=True)


def _register(graph: Any, codes: str, name: str, made: Constants) -> list[Any]:
    """Add a weight's constants to a graph; return the values in the order of the inputs."""
    found = [(codes, made.codes), (f"{name}_scales", made.scales)]
    if made.zeros is not None:
        found.append((f"{name}_zero_points", made.zeros))
    values = [_value(label, constant) for label, constant in found]
    for value in values:
        graph.register_initializer(value)
    return values


def _value(name: str, constant: Constant) -> Any:
    import onnx_ir as ir

    dtype, shape = ir.DataType[constant.type], ir.Shape(constant.shape)
    if dtype.bitwidth < 8:
        tensor: Any = ir.PackedTensor(constant.data, dtype, shape=shape, name=name)
    else:
        array = constant.data.view(np.dtype(dtype.numpy())).reshape(constant.shape)
        tensor = ir.Tensor(array, dtype=dtype, name=name)
    return ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=tensor)


def _drop(graph: Any, value: Any) -> None:
    """Remove a float weight that nothing reads any more, and the transposition of it."""
    for use in list(value.uses()):
        assert not use.node.outputs[0].uses()  # its products have been replaced
        use.node.graph.remove(use.node, safe=True)
    del graph.initializers[value.name]
