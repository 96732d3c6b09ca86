"""Odd uses of one weight in one graph, written by hand; the oracle is numpy with W + A B."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper

from kilodelta.errors import InputError
from kilodelta.export.adapter.graph import with_adapter
from kilodelta.export.onnx.save import save
from kilodelta.export.onnx.template import Template, fill_template
from tests.support.making import bits_of, write

N = 4
RNG = np.random.default_rng(5)
W = RNG.normal(size=(N, N)).astype(np.float32)
K = RNG.normal(size=(3, 2, 1, 1)).astype(np.float32)


def template(nodes: list[Any], inputs: dict[str, list[Any]], weights: dict[str, Any]) -> Template:
    kinds = {"ids": TensorProto.INT64}
    made = helper.make_model(
        helper.make_graph(
            nodes,
            "odd",
            [
                helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), s)
                for n, s in inputs.items()
            ],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [onnx.numpy_helper.from_array(values, name) for name, values in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    return Template(
        model=ir.from_proto(made),
        dtype="float32",
        weights=MappingProxyType({name: values.shape for name, values in weights.items()}),
        unused=(),
        inputs=(),
        outputs=(),
        opset=20,
    )


def computed(of: Template, base: Path, feeds: dict[str, Any], folder: Path) -> Any:
    (path,) = save(fill_template(of, base), folder / "odd.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def checkpoint(folder: Path, name: str, values: Any) -> Path:
    held = {name: ("F32", values.shape, bits_of("F32", values))}
    return write(folder / "base.safetensors", held)


@pytest.mark.parametrize("which", range(7))
def test_each_use_of_a_matrix_takes_the_update(which: int, tmp_path: Path) -> None:
    """One use alone, then (the last) all together, where one layout of factors serves them all."""
    node = helper.make_node
    uses = [
        ([node("Gemm", ["x", "W"], ["u0"], alpha=0.5)], lambda x, ids, W: 0.5 * (x @ W)),
        ([node("Gemm", ["x", "W"], ["u1"], transB=1)], lambda x, ids, W: x @ W.T),
        ([node("MatMul", ["x", "W"], ["u2"])], lambda x, ids, W: x @ W),
        (
            [
                node("Transpose", ["W"], ["t3"], perm=[1, 0]),
                node("Gemm", ["x", "t3"], ["u3"], transB=1),
            ],
            lambda x, ids, W: x @ W,
        ),
        ([node("MatMul", ["W", "x"], ["u4"])], lambda x, ids, W: W @ x),
        ([node("Gather", ["W", "ids"], ["u5"], axis=0)], lambda x, ids, W: W[ids]),
    ]
    chosen = range(6) if which == 6 else [which]
    nodes = [n for i in chosen for n in uses[i][0]]
    nodes.append(node("Sum", [f"u{i}" for i in chosen], ["y"]))
    base = checkpoint(tmp_path, "W", W)
    made = template(nodes, {"x": [N, N], "ids": [N]}, {"W": W})
    wide, layout = with_adapter(made, base, include=("W",), rank=2)
    (tensor,) = layout.exposed
    assert tensor.use == ("turned" if which == 1 else "straight")
    A, B = RNG.normal(size=(N, 2)).astype(np.float32), RNG.normal(size=(2, N)).astype(np.float32)
    update = (A @ B).T if tensor.use == "turned" else A @ B
    x, ids = RNG.normal(size=(N, N)).astype(np.float32), np.array([3, 0, 0, 2])
    feeds = {"x": x, "ids": ids, tensor.names[0]: A, tensor.names[1]: B}
    expected = sum(uses[i][1](x, ids, W + update) for i in chosen)
    assert np.allclose(computed(wide, base, feeds, tmp_path), expected, rtol=1e-5, atol=1e-5)


def test_a_kernel_that_is_also_used_otherwise(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "K"], ["u"]),
        helper.make_node("ReduceSum", ["K"], ["s"], keepdims=0),
        helper.make_node("Add", ["u", "s"], ["y"]),
    ]
    base = checkpoint(tmp_path, "K", K)
    made = template(nodes, {"x": [1, 2, 5, 5]}, {"K": K})
    wide, layout = with_adapter(made, base, include=("K",), rank=1)
    (tensor,) = layout.exposed
    A, B = RNG.normal(size=(3, 1)).astype(np.float32), RNG.normal(size=(1, 2)).astype(np.float32)
    x = RNG.normal(size=(1, 2, 5, 5)).astype(np.float32)
    kernel = K[:, :, 0, 0] + A @ B
    expected = np.einsum("oc,ncij->noij", kernel, x) + kernel.sum()
    feeds = {"x": x, tensor.names[0]: A, tensor.names[1]: B}
    assert np.allclose(computed(wide, base, feeds, tmp_path), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("operator", "channels", "shape"),
    [("Conv", 4, (4, 1, 2, 2)), ("Conv", 4, (6, 2, 2, 2)), ("ConvTranspose", 4, (4, 3, 2, 2))],
    ids=["depthwise", "grouped", "transposed"],
)
def test_convolutions_of_every_kind_are_exposed_by_default(
    operator: str, channels: int, shape: tuple[int, ...], tmp_path: Path
) -> None:
    """They are what `compress` changes by default, so a default folder must take it."""
    kernel = RNG.normal(size=shape).astype(np.float32)
    group = 1 if operator == "ConvTranspose" else channels // shape[1]
    nodes = [helper.make_node(operator, ["x", "K"], ["y"], group=group)]
    size = [1, channels, 5, 5]
    base = checkpoint(tmp_path, "K", kernel)
    made = template(nodes, {"x": size}, {"K": kernel})
    wide, layout = with_adapter(made, base, rank=2)
    assert [one.info.name for one in layout.exposed] == ["K"]
    x = RNG.normal(size=size).astype(np.float32)
    [exposed] = layout.exposed
    A, B = (RNG.normal(size=s).astype(np.float32) for s in exposed.shapes(2))
    update = (A @ B).reshape(shape)
    changed = template(nodes, {"x": size}, {"K": kernel + update})
    expected = computed(changed, checkpoint(tmp_path, "K", kernel + update), {"x": x}, tmp_path)
    base = checkpoint(tmp_path, "K", kernel)
    wide_result = computed(wide, base, {"x": x, exposed.names[0]: A, exposed.names[1]: B}, tmp_path)
    np.testing.assert_allclose(wide_result, expected, atol=1e-4)
    with pytest.raises(InputError, match="matches a layer"):  # one weight for all rows
        with_adapter(made, base, rank=2, slots=2)


def test_a_layers_weight_is_exposed_where_the_graph_hides_the_product(tmp_path: Path) -> None:
    """An expert: stacked with others, chosen by number, then multiplied by."""
    nodes = [
        helper.make_node("Unsqueeze", ["W", "axis"], ["first"]),
        helper.make_node("Concat", ["first", "others"], ["stacked"], axis=0),
        helper.make_node("Gather", ["stacked", "ids"], ["chosen"], axis=0),
        helper.make_node("MatMul", ["x", "chosen"], ["y"]),
    ]
    others = RNG.normal(size=(2, N, N)).astype(np.float32)
    weights = {"W": W, "others": others, "axis": np.array([0])}
    base = checkpoint(tmp_path, "W", W)
    made = template(nodes, {"x": [2, 1, N], "ids": [2]}, weights)
    made = replace(made, weights=MappingProxyType({"W": W.shape}))
    with pytest.raises(InputError, match="matches a layer"):
        with_adapter(made, base, rank=2)
    with pytest.raises(InputError, match="matches a layer"):  # one weight for all rows
        with_adapter(made, base, rank=2, slots=2, layers={"W"})
    wide, layout = with_adapter(made, base, rank=2, layers={"W"})
    [exposed] = layout.exposed
    A, B = (RNG.normal(size=s).astype(np.float32) for s in exposed.shapes(2))
    x, ids = RNG.normal(size=(2, 1, N)).astype(np.float32), np.array([2, 0])
    feeds = {"x": x, "ids": ids, exposed.names[0]: A, exposed.names[1]: B}
    expected = np.stack([x[0] @ others[1], x[1] @ (W + A @ B)])
    assert np.allclose(computed(wide, base, feeds, tmp_path), expected, rtol=1e-5, atol=1e-5)
