"""A weight that simplifying the graph drops is named, and the export fails.

Such a file would compute with the base's constant, and no later fine-tune could reach it.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

pytest.importorskip("onnx_ir")
pytest.importorskip("torch")
import onnx_ir as ir

from kilodelta.errors import ExportError
from kilodelta.export.onnx.proof import require_kept


def test_a_weight_that_no_longer_feeds_the_graph_is_named() -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((1, 2)))
    kept, unused, removed = (
        ir.Value(name=name, const_value=ir.tensor(np.ones((2, 2), np.float32), name=name))
        for name in ("kept", "unused", "removed")
    )
    node = ir.node("MatMul", [x, kept])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[kept, unused])
    model = ir.Model(graph, ir_version=10)
    weights = {"a": [kept], "b": [unused], "c": [removed], "twice": [unused, kept]}
    require_kept(model, weights, ["a", "twice", "not a weight"])
    require_kept(model, weights, [])  # the outputs do not depend on b and c
    with pytest.raises(ExportError, match=re.escape("simplifying the graph lost b, c")):
        require_kept(model, weights, ["a", "b", "c", "twice"])
