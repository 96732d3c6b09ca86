"""ONNX files for tests, made of any tensors: each is an initializer that feeds a node."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.support import making

KINDS = {
    "F32": TensorProto.FLOAT,
    "F16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "I64": TensorProto.INT64,
}
WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8}


def initializer(name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> TensorProto:
    return helper.make_tensor(name, KINDS[dtype], shape, data, raw=True)


def turned(dtype: str, shape: tuple[int, ...], data: bytes) -> tuple[str, tuple[int, ...], bytes]:
    """A matrix the other way round."""
    values = np.frombuffer(data, f"u{WIDTHS[dtype]}").reshape(shape)
    return dtype, shape[::-1], np.ascontiguousarray(values.T).tobytes()


def model(
    tensors: making.Tensors,
    *,
    names: Mapping[str, str] | None = None,
    transposed: Collection[str] = (),
) -> onnx.ModelProto:
    """A model that holds tensors, some of them renamed or transposed."""
    held = {n: turned(*t) if n in transposed else t for n, t in tensors.items()}
    renamed = {(names or {}).get(name, name): tensor for name, tensor in held.items()}
    weights = [initializer(name, *tensor) for name, tensor in renamed.items()]
    nodes = [helper.make_node("Shape", [name], [f"{name}:shape"]) for name in renamed]
    outputs = [
        helper.make_tensor_value_info(f"{name}:shape", TensorProto.INT64, [len(t[1])])
        for name, t in renamed.items()
    ]
    graph = helper.make_graph(nodes, "g", [], outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def write(path: Path, made: onnx.ModelProto, *, external: bool = False) -> Path:
    """Save a model, its tensors in `<name>.data` where `external`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    place: dict[str, Any] = {"location": f"{path.name}.data", "size_threshold": 0}
    onnx.save(made, str(path), **({"save_as_external_data": True, **place} if external else {}))
    return path


def held(path: Path) -> dict[str, bytes]:
    """The initializers of a file by name, as the `onnx` package reads them."""
    graph = onnx.load(str(path)).graph
    return {tensor.name: tensor.raw_data for tensor in graph.initializer}
