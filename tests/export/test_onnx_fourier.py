"""Fourier transforms in exported graphs; the oracle is numpy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx_ir as ir
from onnx import TensorProto, helper
from onnxruntime import InferenceSession

from kilodelta.export.onnx.fourier import write_out_transforms


def transform(x: Any, *, axis: int, inverse: bool, length: int | None, opset: int = 20) -> Any:
    """A DFT of (2, n, 6, parts) in ONNX Runtime, written out; `length` None leaves n free."""
    by_input = {"inputs": ["x", "", "axis"]} if opset == 20 else {"inputs": ["x"], "axis": axis}
    node = helper.make_node("DFT", outputs=["y"], inverse=int(inverse), **by_input)
    axes = [helper.make_tensor("axis", TensorProto.INT64, [], [axis])] if opset == 20 else []
    shape = [2, "n" if length is None else length, 6, x.shape[-1]]
    proto = helper.make_model(
        helper.make_graph(
            [node],
            "one",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [*shape[:3], 2])],
            axes,
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=10,
    )
    model = ir.from_proto(proto)
    write_out_transforms(model)
    assert not any(node.op_type == "DFT" for node in model.graph)
    data = ir.to_proto(model).SerializeToString()
    (y,) = InferenceSession(data, providers=["CPUExecutionProvider"]).run(["y"], {"x": x})
    return y[..., 0] + 1j * y[..., 1]


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("is_free", [False, True])
def test_every_transform_is_numpys(inverse: bool, parts: int, axis: int, is_free: bool) -> None:
    x = np.random.default_rng(0).standard_normal((2, 40, 6, parts)).astype(np.float32)
    signal = x.astype(np.float64) @ [1, 1j][:parts]
    expected = (np.fft.ifft if inverse else np.fft.fft)(signal, axis=axis)
    length = None if is_free else 40
    actual = transform(x, axis=axis, inverse=inverse, length=length)
    # A sum of 40 products is off by about sqrt(40) / 2 roundings of 6e-8, angles by as much.
    assert np.linalg.norm(actual - expected) < 4e-7 * np.linalg.norm(expected)


def test_a_transform_of_a_transform_whose_shape_is_not_noted() -> None:
    """As torch writes FNet's: over two axes, one after the other."""
    nodes = [
        helper.make_node("DFT", ["x", "", "two"], ["between"]),
        helper.make_node("DFT", ["between", "", "one"], ["y"]),
    ]
    proto = helper.make_model(
        helper.make_graph(
            nodes,
            "two",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, "n", 6, 1])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, "n", 6, 2])],
            [
                helper.make_tensor(n, TensorProto.INT64, [], [i])
                for n, i in (("one", 1), ("two", 2))
            ],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    model = ir.from_proto(proto)
    write_out_transforms(model)
    assert not any(node.op_type == "DFT" for node in model.graph)
    data = ir.to_proto(model).SerializeToString()
    x = np.random.default_rng(0).standard_normal((2, 9, 6, 1)).astype(np.float32)
    (y,) = InferenceSession(data, providers=["CPUExecutionProvider"]).run(["y"], {"x": x})
    expected = np.fft.fft2(x[..., 0].astype(np.float64), axes=(1, 2))
    actual = y[..., 0] + 1j * y[..., 1]
    assert np.linalg.norm(actual - expected) < 6e-7 * np.linalg.norm(expected)


def test_the_older_operator_names_its_axis_otherwise() -> None:
    x = np.random.default_rng(0).standard_normal((2, 100, 6, 1)).astype(np.float32)
    actual = transform(x, axis=1, inverse=False, length=None, opset=18)
    expected = np.fft.fft(x[..., 0].astype(np.float64), axis=1)
    # ONNX Runtime's own operator is off by 1e-5 at this length.
    assert np.linalg.norm(actual - expected) < 6e-7 * np.linalg.norm(expected)
