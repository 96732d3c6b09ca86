"""Find the quantised weights of an ONNX graph: `MatMulNBits` and `DequantizeLinear` of constants.

A weight's name is its initializer's without what ONNX Runtime's quantisers append
(`layer.weight_Q4` is `layer.weight`).
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from kilodelta.errors import CheckpointError
from kilodelta.grid.layouts.onnx_blocks import DequantizeLinear, MatMulNBits
from kilodelta.grid.matrix import Shape
from kilodelta.grid.model import QuantisedModel, Stored, described
from kilodelta.grid.onnx_source import OnnxSource, explained

SUFFIX = re.compile(r"_(?:DQ_)?(?:Q\d+|quantized)\Z")
_TYPES = ("INT4", "UINT4", "INT8", "UINT8", "INT2", "UINT2", "FLOAT8E4M3FN", "FLOAT4E2M1")


def open_onnx(path: Path) -> QuantisedModel:
    """Open an ONNX graph.

    Raises:
        CheckpointError: it cannot be read, holds no quantised weight, or one that was packed for
            one kernel.
        MissingPackageError: `onnx` is not installed.
    """
    source = OnnxSource(path)
    with explained(path):
        stored = _stored(source)
    return described(path, "onnx", {"quant_method": "onnx"}, stored, source)


def _stored(source: OnnxSource) -> list[Stored]:
    first: dict[str, Stored] = {}
    for weight in every_copy(source):
        first.setdefault(weight.name, weight)
    return list(first.values())


def every_copy(source: OnnxSource) -> list[Stored]:
    """List the quantised weights of a graph, each set of constants once.

    Two of one name are copies of one weight, such as an embedding and the head tied to it.

    Raises:
        CheckpointError: a weight was packed for one kernel, or a node breaks the operator's rules.
    """
    graph = source.model.graph
    stored: dict[str, Stored] = {}
    readers = _readers(graph)
    makers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        weight = None
        if node.op_type == "MatMulNBits":
            weight = _matmul(node, source)
            if weight is not None:
                weight = _with_minima(weight, node, source, readers, makers)
        elif node.op_type == "DequantizeLinear":
            weight = _dequantised(node, source, readers)
        if weight is not None:
            _require_alike(stored.setdefault(weight.codes, weight), weight)
    return list(stored.values())


def _integers(node: Any, *names: str) -> dict[str, int]:
    """Return those of a node's attributes that are present; ONNX defines each as one integer.

    Raises:
        CheckpointError: one has another type. Its integer would read as the default, 0.
    """
    given: dict[str, int] = {}
    for attribute in node.attribute:
        if attribute.name not in names:
            continue
        if attribute.type != attribute.INT:
            raise CheckpointError(
                f"attribute {attribute.name} of {node.op_type} {node.name!r:.200} is no integer",
                fix="export the graph anew",
            )
        given[attribute.name] = attribute.i
    return given


def _require_alike(first: Stored, weight: Stored) -> None:
    """Refuse codes that two nodes read with other scales: they are two weights, which stay so."""
    if first.parts != weight.parts:
        differ = {name for role, name in weight.parts.items() if first.parts.get(role) != name}
        raise CheckpointError(
            f"{weight.codes:.200} holds the codes of two weights: one node reads them with"
            f" {', '.join(sorted(differ)) or 'fewer constants':.200}, another without",
            fix="export the graph with constants of its own for each weight",
        )


def _made(name: str, role: str, given: str) -> CheckpointError:
    return CheckpointError(
        f"{name:.200}: its {role} {given!r:.200} is no initializer of the graph but an input of it,"
        " or made by a node",
        fix="fold the graph's constants into initializers, and give that graph",
    )


def _named(name: str, layout: Any, node: Any, roles: dict[str, int], source: OnnxSource) -> Stored:
    """Name the constants of a weight.

    Raises:
        CheckpointError: an input of the node is no initializer, so that its numbers are not known.
    """
    parts = {}
    for role, index in roles.items():
        given = node.input[index] if len(node.input) > index else ""
        if given in source.tensors:
            parts[role] = given
        elif given:
            raise _made(name, role, given)
    return Stored(name=SUFFIX.sub("", name), layout=layout, parts=parts)


def _matmul(node: Any, source: OnnxSource) -> Stored | None:
    given = _integers(node, "N", "K", "bits", "block_size", "weight_prepacked")
    name = node.input[1]
    if name not in source.tensors:
        return None
    if given.get("weight_prepacked"):
        raise CheckpointError(
            f"{name:.200} is prepacked for one kernel, and such a layout is not read",
            fix="quantise without weight_prepacked",
        )
    if len(node.input) > 4 and node.input[4]:
        raise CheckpointError(
            f"{name:.200} has g_idx, which ONNX Runtime no longer reads", fix="quantise without it"
        )
    bits = given.get("bits", 4)
    if not 1 <= bits <= 8:
        raise CheckpointError(
            f"{name:.200}: bits of MatMulNBits is {bits}, not 1 to 8", fix="export the graph anew"
        )
    missing = [attribute for attribute in ("N", "K", "block_size") if attribute not in given]
    if missing:
        raise CheckpointError(
            f"{name:.200}: its MatMulNBits has no {' and no '.join(missing)}",
            fix="export the graph anew",
        )
    if given["block_size"] < 1 or given["block_size"] * bits % 8:
        raise CheckpointError(
            f"{name:.200}: block_size of MatMulNBits is {given['block_size']}, which is no whole"
            f" number of bytes of {bits} bits",
            fix="export the graph anew",
        )
    layout = MatMulNBits(shape=(given["N"], given["K"]), bits=bits, group=given["block_size"])
    return _named(name, layout, node, {"B": 1, "scales": 2, "zero_points": 3}, source)


def _with_minima(
    weight: Stored,
    node: Any,
    source: OnnxSource,
    readers: dict[str, list[tuple[Any, int]]],
    makers: dict[str, Any],
) -> Stored:
    """Find the minima of a weight: what is added to its product, if `export` wrote it so.

    That is the sum of x over each block (a product by zeros and ones), times constants.
    """
    layout = weight.layout
    assert isinstance(layout, MatMulNBits)  # the caller has just made it
    for reader, index in readers.get(node.output[0], ()):
        if reader.op_type != "Add" or len(reader.input) != 2:
            continue
        added = makers.get(reader.input[1 - index])
        if added is None or added.op_type != "MatMul" or added.input[1] not in source.tensors:
            continue
        sums = makers.get(added.input[0])
        if sums is None or sums.op_type != "MatMul" or sums.input[0] != node.input[0]:
            continue
        if sums.input[1] in source.tensors and layout.are_sums(source.raw(sums.input[1])):
            return replace(weight, parts={**weight.parts, "minima": added.input[1]})
    return weight


def _readers(graph: Any) -> dict[str, list[tuple[Any, int]]]:
    """List, for each value, the nodes that read it and at which input."""
    found: dict[str, list[tuple[Any, int]]] = {}
    for node in graph.node:
        for index, name in enumerate(node.input):
            found.setdefault(name, []).append((node, index))
    return found


def _dequantised(
    node: Any, source: OnnxSource, readers: dict[str, list[tuple[Any, int]]]
) -> Stored | None:
    name = node.input[0]
    if name not in source.tensors or source.type_of(name) not in _TYPES:
        return None
    shape = source.shape_of(name)
    if len(shape) != 2 or any(reader.op_type == "DequantizeLinear" for reader, _ in
                              readers.get(node.output[0], ())):  # fmt: skip
        return None  # a bias, or the scales of another DequantizeLinear
    transposed = _is_transposed(node.output[0], readers)
    given = _integers(node, "axis", "block_size")
    scale = node.input[1]
    inner = None
    if scale not in source.tensors:
        inner = next((n for n in source.model.graph.node if scale in n.output), None)
        if inner is not None and inner.op_type == "DequantizeLinear":
            scale = inner.input[0]
        if scale not in source.tensors:
            raise _made(name, "scale", scale)
    axis = given.get("axis", 1)
    if not -2 <= axis <= 1:
        raise CheckpointError(
            f"{name:.200}: axis of its DequantizeLinear is {axis}, and it has two",
            fix="export the graph anew",
        )
    grid = source.shape_of(scale)
    by_axis = _block(name, shape, grid, axis % 2, given.get("block_size", 0))
    _require_points(node, source, grid)
    block = (by_axis[1], by_axis[0]) if transposed else by_axis
    upright = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    layout = DequantizeLinear(
        shape=upright, type=source.type_of(name), transposed=transposed, block=block
    )
    if inner is None:
        return _named(name, layout, node, {"x": 0, "x_scale": 1, "x_zero_point": 2}, source)
    found = _named(name, layout, node, {"x": 0, "x_zero_point": 2}, source)
    scales = _named(scale, layout, inner, {"x_scale": 0, "x_scale_scale": 1}, source)
    _require_points(inner, source, source.shape_of(inner.input[1]))
    return replace(found, parts={**found.parts, **scales.parts})


def _is_transposed(value: str, readers: dict[str, list[tuple[Any, int]]]) -> bool:
    """Return whether a constant is (in, out): the second input of a MatMul or a plain Gemm."""
    for node, index in readers.get(value, ()):
        if node.op_type == "MatMul" and index == 1:
            return True
        if node.op_type == "Gemm" and index == 1:
            return not _integers(node, "transB").get("transB", 0)
    return False


def _block(
    name: str, shape: tuple[int, ...], scales: tuple[int, ...], axis: int, size: int
) -> Shape:
    """Return how many rows and columns of the constant share a scale.

    Raises:
        CheckpointError: there are more scales or fewer.
    """
    if scales in ((), (1,)) and not size:
        return shape[0], shape[1]
    if size:
        block = (size, 1) if axis == 0 else (1, size)
        wanted = tuple(-(-n // max(many, 1)) for n, many in zip(shape, block, strict=True))
    else:
        block, wanted = ((1, shape[1]) if axis == 0 else (shape[0], 1)), (shape[axis],)
    if size < 0 or scales != wanted:
        raise CheckpointError(
            f"{name:.200}: its DequantizeLinear has scales {list(scales)} along axis {axis} in"
            f" blocks of {size}, and {list(wanted)} belong to a constant {list(shape)}",
            fix="export the graph anew",
        )
    return block


def _require_points(node: Any, source: OnnxSource, scales: tuple[int, ...]) -> None:
    """Check that zero points are of the constant's type and of the scales' shape.

    Raises:
        CheckpointError: they are not, or those of a float type, which ONNX wants to be zero, are
            not zero.
    """
    name, points = node.input[0], node.input[2] if len(node.input) > 2 else ""
    if points not in source.tensors:
        return
    kind, shape = source.type_of(points), source.shape_of(points)
    alike = shape == scales or {shape, scales} <= {(), (1,)}
    if kind != source.type_of(name) or not alike:
        raise CheckpointError(
            f"{name:.200} is {source.type_of(name)} with scales {list(scales)}, and its zero points"
            f" are {kind} {list(shape)}",
            fix="export the graph anew",
        )
    if kind.startswith("FLOAT") and source.raw(points).data.any():
        raise CheckpointError(
            f"{name:.200} is {kind} with zero points that are not zero, which ONNX does not define",
            fix="export the graph anew",
        )
