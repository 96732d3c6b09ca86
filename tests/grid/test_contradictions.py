"""Files that say two things at once: parts that no layout reads, configurations that disagree.

Each of these was read once, with values that were not the model's.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from kilodelta.errors import CheckpointError
from kilodelta.grid import is_quantised, open_quantised
from kilodelta.grid.dequantise import float_folder
from tests.support import grids
from tests.support.grids import Numbers

N = Numbers(16, 64, 32, zeros=True)
PACKED = grids.pack_quantized("a", N, zeros=True)
ASYMMETRIC = grids.ct_config(symmetric=False)
E4M3 = ml_dtypes.float8_e4m3fn
FP8 = np.arange(32).reshape(4, 8).astype(E4M3)
INT4 = {"a.weight": np.zeros((4, 64), np.uint8), "a.weight_scale": np.ones((8, 2), np.float32)}
NVFP4 = {
    "a.weight_packed": np.zeros((2, 8), np.uint8),
    "a.weight_scale": np.ones((2, 1), E4M3),
    "a.weight_global_scale": np.ones(1, np.float32),
}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}
ONE = {"a.weight": FP8, "a.weight_scale_inv": np.ones((1, 1), np.float32)}


def read(place: Path, config: Any, tensors: dict[str, Any]) -> None:
    open_quantised(grids.folder(place, config, tensors)).identity(threads=1)


@pytest.mark.parametrize(
    ("config", "tensors", "said"),
    [
        (
            MODELOPT,
            {**INT4, "a.weight_scale_2": np.array(0.5, np.float32)},
            "a.weight_scale_2 belongs to a weight in the layout ModelOpt INT4",
        ),
        (
            {"quant_method": "modelopt"},
            {**ONE, "a.weight_scale_2": np.array(0.5, np.float32)},
            r"a.weight_scale_2 belongs to .* FP8 \(E4M3\), which has no weight_scale_2",
        ),
        (
            grids.FP8,
            {**ONE, "a.weight_scale": np.full(1, 0.5, np.float32)},
            "a.weight_scale belongs to a weight",
        ),
        (
            grids.NVFP4,
            {**NVFP4, "a.weight_zero_point": np.ones((2, 1), np.int32)},
            "a.weight_zero_point belongs to a weight",
        ),
        (
            grids.AWQ,
            {**grids.awq("a", N), "a.g_idx": np.zeros(64, np.int32)},
            "a.g_idx belongs to a weight in the layout AWQ",
        ),
        (
            grids.NVFP4,
            {**NVFP4, "a.weight_global_scale": np.full(1, np.inf, np.float32)},
            "a.weight: .* weight_global_scale is inf",
        ),
        (grids.CT, PACKED, "a.weight: .* zero points, and the configuration says symmetric"),
        (grids.ct_config(type="float"), PACKED, "a: packed codes of type 'float' are not read"),
        ({**MODELOPT, "group_size": 128}, INT4, "64 columns in 2 groups, .* states groups of 128"),
        (
            MODELOPT,
            {**INT4, "a.weight_scale": np.ones((8, 3), np.float32)},
            "a.weight: 64 columns in 3 groups",
        ),
        (
            MODELOPT,
            {**INT4, "a.weight_scale": np.ones((8, 2), np.uint8)},
            r"a.weight: MXFP4 \(U8 scales\) is not read",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [64, 0]},
            ONE,
            r"a: the configuration states blocks of \[64, 0\]",
        ),
        (
            grids.GPTQ,
            {**grids.gptq("a", Numbers(5, 64, 32)), "a.qzeros": np.zeros((2, 0), np.int32)},
            "a: 5 rows are no multiple of 8",
        ),
        (
            ASYMMETRIC,
            {
                **grids.pack_quantized("b", N, zeros=True),
                "a.weight_packed": np.zeros((0, 8), np.int32),
                "a.weight_scale": np.ones((0, 2), np.float16),
                "a.weight_zero_point": np.zeros((0, 2), np.int32),
                "a.weight_shape": np.array([0, 64]),
            },
            r"a.weight has shape \[0, 64\], which holds no weight",
        ),
        (
            grids.FP8,
            {**ONE, "experts.up": FP8.reshape(2, 2, 8), "experts.up_scale_inv": np.ones(2, "f4")},
            r"experts.up is F8_E4M3 \[2, 2, 8\] with experts.up_scale_inv: stacked experts",
        ),
    ],
)
def test_what_contradicts_itself(
    tmp_path: Path, config: Any, tensors: dict[str, Any], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        read(tmp_path / "m", config, tensors)


def test_zero_points_of_zero_contradict_nothing(tmp_path: Path) -> None:
    """Some writers store them of symmetric weights."""
    read(tmp_path / "fp8", grids.FP8, {**ONE, "a.weight_zero_point": np.zeros(1, E4M3)})
    even = Numbers(16, 64, 32)
    read(tmp_path / "ct", grids.CT, grids.pack_quantized("a", even, zeros=True))


def test_schemes_are_told_apart_by_name_and_by_kind_of_code(tmp_path: Path) -> None:
    block = {"num_bits": 8, "type": "float", "block_structure": [2, 4]}
    groups = {
        "blocks": {"targets": ["re:mlp.*"], "weights": block},
        "rows": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}},
        "head": {"targets": ["head"], "weights": {"num_bits": 4, "group_size": 32}},
    }
    tensors = {
        **{"mlp.weight": FP8, "mlp.weight_scale": np.ones((2, 2), np.float32)},
        **{"attention.weight": FP8, "attention.weight_scale": np.ones((4, 1), np.float32)},
        **grids.pack_quantized("head", Numbers(4, 64, 32)),
    }
    config = {"quant_method": "compressed-tensors", "config_groups": groups}
    model = open_quantised(grids.folder(tmp_path / "m", config, tensors))
    blocks = {name: model.matrix(name).block for name in model.stored}
    assert blocks == {"mlp.weight": (2, 4), "attention.weight": (1, 8), "head.weight": (1, 32)}


@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        (
            {**ASYMMETRIC, "transform_config": {"config_groups": {"u": {"type": "hadamard"}}}},
            PACKED,
        ),
        ({**grids.GPTQ, "rotation": "hadamard"}, grids.gptq("a", N)),
    ],
)
def test_weights_that_were_rotated_are_refused(
    tmp_path: Path, config: dict[str, Any], tensors: Any
) -> None:
    with pytest.raises(CheckpointError, match="weights were rotated before"):
        read(tmp_path / "m", config, tensors)
    none: dict[str, Any] = {"transform_config": {"config_groups": {}}, "rotation": None}
    read(tmp_path / "n", {**config, **none}, tensors)
    read(tmp_path / "o", {**config, **none, "transform_config": {}}, tensors)


@pytest.mark.parametrize(
    ("config", "tensors", "file", "other", "said"),
    [
        (
            grids.GPTQ,
            grids.gptq("a", N),
            "quantize_config.json",
            {"bits": 4, "checkpoint_format": "gptq_v2"},
            "checkpoint_format is gptq in config.json, gptq_v2 in quantize_config.json",
        ),
        (
            grids.AWQ,
            grids.awq("a", N),
            "quant_config.json",
            {"w_bit": 4, "version": "GEMV"},
            "version is gemm in config.json, gemv in quant_config.json",
        ),
    ],
)
def test_configurations_that_disagree(
    tmp_path: Path, config: Any, tensors: dict[str, Any], file: str, other: Any, said: str
) -> None:
    place = grids.folder(tmp_path / "m", config, tensors)
    (place / file).write_text(json.dumps(other))
    with pytest.raises(CheckpointError, match=said):
        open_quantised(place)
    for same in ({"bits": 4, "checkpoint_format": "gptq"}, {"w_bit": 4, "version": "GEMM"}):
        (place / file).write_text(json.dumps(same))
        open_quantised(place)


def test_a_configuration_of_the_text_model_counts(tmp_path: Path) -> None:
    place = grids.folder(tmp_path / "m", None, grids.gptq("a", N))
    with pytest.raises(CheckpointError, match=r"yet a\.qweight is a tensor of codes"):
        open_quantised(place)
    inner = {"text_config": {"hidden_size": 8, "quantization_config": grids.GPTQ}}
    (place / "config.json").write_text(json.dumps(inner))
    assert is_quantised(place)
    with float_folder(open_quantised(place)) as floats:
        assert json.loads((floats / "config.json").read_text()) == {
            "text_config": {"hidden_size": 8}
        }


def _graph(place: Path, change: Any) -> Path:
    """One INT4 weight behind DequantizeLinear, axis 0 in blocks of 16, with a change."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    codes = helper.make_tensor("w", TensorProto.INT4, (64, 6), [k % 7 for k in range(384)])
    points = helper.make_tensor("z", TensorProto.INT4, (4, 6), [3] * 24)
    scales = numpy_helper.from_array(np.ones((4, 6), np.float32), "s")
    names = ["w", "s", "z"]
    nodes = [helper.make_node("DequantizeLinear", names, ["d"], axis=0, block_size=16),
             helper.make_node("MatMul", ["x", "d"], ["y"])]  # fmt: skip
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], [codes, scales, points])
    change(graph)
    sets = [helper.make_opsetid("", 25), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=sets, ir_version=10), place)
    return place


def _made_by_a_node(graph: Any, name: str) -> None:
    from onnx import helper

    constant = next(tensor for tensor in graph.initializer if tensor.name == name)
    graph.node.insert(0, helper.make_node("Constant", [], [name], value=constant))
    graph.initializer.remove(constant)


def _of_other_type(graph: Any) -> None:
    graph.initializer[2].data_type = 21  # UINT4


def _second_reader(graph: Any) -> None:
    from onnx import helper

    again = helper.make_node("DequantizeLinear", ["w", "s"], ["e"], axis=0, block_size=16)
    graph.node.extend([again, helper.make_node("MatMul", ["x", "e"], ["q"])])


def _shape(index: int, dims: list[int]) -> Any:
    def change(graph: Any) -> None:
        graph.initializer[index].dims[:] = dims

    return change


def _attribute(name: str, value: int) -> Any:
    def change(graph: Any) -> None:
        next(a for a in graph.node[0].attribute if a.name == name).i = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda graph: _made_by_a_node(graph, "z"), "w: its x_zero_point 'z' is no initializer"),
        (lambda graph: _made_by_a_node(graph, "s"), "w: its scale 's' is no initializer"),
        (_of_other_type, r"w is INT4 .* its zero points are UINT4 \[4, 6\]"),
        (_shape(2, [6, 4]), r"its zero points are INT4 \[6, 4\]"),
        (_shape(1, [6, 4]), r"scales \[6, 4\] along axis 0 in blocks of 16, and \[4, 6\]"),
        (_shape(1, [24]), r"scales \[24\] along axis 0"),
        (_attribute("axis", 5), "axis of its DequantizeLinear is 5"),
        (_attribute("block_size", -16), "in blocks of -16"),
        (_second_reader, "w holds the codes of two weights"),
    ],
)
def test_a_graph_that_contradicts_itself(tmp_path: Path, change: Any, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        open_quantised(_graph(tmp_path / "m.onnx", change))


def test_scales_that_are_dequantised_themselves(tmp_path: Path) -> None:
    """NVFP4: the inner scales come out of a node, of which each constant is an initializer."""

    def change(graph: Any, made: str = "") -> None:
        from onnx import TensorProto, helper, numpy_helper

        codes = helper.make_tensor("w", TensorProto.FLOAT4E2M1, (64, 6), [1.5] * 384)
        scales = helper.make_tensor("t", TensorProto.FLOAT8E4M3FN, (4, 6), [2.0] * 24)
        whole = numpy_helper.from_array(np.array(0.25, np.float32), "g")
        del graph.initializer[:]
        graph.initializer.extend([codes, scales, whole])
        graph.node[0].input[:] = ["w", "s"]
        graph.node.insert(0, helper.make_node("DequantizeLinear", ["t", "g"], ["s"]))
        if made:
            _made_by_a_node(graph, made)

    model = open_quantised(_graph(tmp_path / "m.onnx", change))
    assert (model.matrix("w").values() == 0.75).all()
    for made, role in (("t", "scale"), ("g", "x_scale_scale")):
        place = _graph(tmp_path / "m.onnx", partial(change, made=made))
        with pytest.raises(CheckpointError, match=f"its {role} '{made}' is no initializer"):
            open_quantised(place)


def test_the_graph_itself_is_read(tmp_path: Path) -> None:
    model = open_quantised(_graph(tmp_path / "m.onnx", lambda graph: None))
    assert model.matrix("w").values()[0, 1] == 6 - 3


def test_float_codes_have_no_zero_point(tmp_path: Path) -> None:
    def change(graph: Any) -> None:
        from onnx import TensorProto, helper

        for index, dims in ((0, (64, 6)), (2, (4, 6))):
            raw = np.full(dims, 0x38, np.uint8).tobytes()
            tensor = helper.make_tensor("wsz"[index], TensorProto.FLOAT8E4M3FN, dims, raw, raw=True)
            graph.initializer[index].CopyFrom(tensor)

    with pytest.raises(CheckpointError, match="zero points that are not zero"):
        open_quantised(_graph(tmp_path / "m.onnx", change))


@pytest.mark.parametrize(
    ("attribute", "said"), [("N", "has no N"), ("K", "has no K"), ("block_size", "no block_size")]
)
def test_a_product_of_bits_without_its_sizes(tmp_path: Path, attribute: str, said: str) -> None:
    onnx = pytest.importorskip("onnx")
    place = grids.matmul_graph(tmp_path / "m.onnx", {"w": N})
    model = onnx.load(place)
    given = model.graph.node[0].attribute
    given.remove(next(a for a in given if a.name == attribute))
    onnx.save(model, place)
    with pytest.raises(CheckpointError, match=said):
        open_quantised(place)
