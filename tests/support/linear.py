"""A linear layer as an ONNX file, in any precision, and inputs that its tests know."""

from __future__ import annotations

import numpy as np
import pytest

from kilodelta.files.dtypes import named

onnx = pytest.importorskip("onnx")

LINEAR_X = np.random.default_rng(1).standard_normal((8, 64)).astype(np.float16).astype(float)
LINEAR_W = np.random.default_rng(2).standard_normal((64, 3)).astype(np.float16).astype(float)


def linear_model(precision: str) -> bytes:
    """y = x w with x (rows, 64) and w (64, 3) in one precision."""
    kind = {"float32": "FLOAT"}.get(precision, precision.upper())
    dtype, helper = getattr(onnx.TensorProto, kind), onnx.helper
    words = named(precision).narrow(LINEAR_W)
    weight = helper.make_tensor("w", dtype, [64, 3], words.tobytes(), raw=True)
    infos = [
        helper.make_tensor_value_info(name, dtype, ["rows", width])
        for name, width in (("x", 64), ("y", 3))
    ]
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "g", infos[:1], infos[1:], [weight])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    data: bytes = made.SerializeToString()
    return data
