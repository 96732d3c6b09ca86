"""What cannot be read is refused by name, with a fix."""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from kilodelta.errors import CheckpointError, MissingPackageError
from kilodelta.grid import is_quantised, open_quantised
from tests.support import grids
from tests.support.grids import Numbers

N = Numbers(16, 64, 32, zeros=True)
PACKED = grids.pack_quantized("a", N, zeros=True)
ASYMMETRIC = grids.ct_config(symmetric=False)
FP8 = np.zeros((4, 8), ml_dtypes.float8_e4m3fn)


def read(place: Path, config: Any, tensors: dict[str, Any]) -> None:
    model = open_quantised(grids.folder(place, config, tensors))
    for name in model.stored:
        model.matrix(name)


def without(tensors: dict[str, Any], role: str) -> dict[str, Any]:
    return {name: value for name, value in tensors.items() if not name.endswith(role)}


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao", "hqq", None, 7])
def test_an_unknown_method(tmp_path: Path, method: Any) -> None:
    with pytest.raises(CheckpointError, match="these are read: compressed-tensors") as e:
        read(tmp_path / "m", {"quant_method": method}, PACKED)
    assert (repr(method) if method else "states no quant_method") in e.value.what


@pytest.mark.parametrize(
    ("config", "tensors", "said"),
    [
        (ASYMMETRIC, without(PACKED, "scale"), "a.weight.* has no weight_scale"),
        (ASYMMETRIC, without(PACKED, "zero_point"), "a: asymmetric, but .* no weight_zero_point"),
        (ASYMMETRIC, without(PACKED, "weight_shape"), "a: weight_packed has no weight_shape"),
        (grids.NVFP4, {"a.weight_packed": np.zeros((4, 8), np.uint8)}, "has no weight_scale"),
        (grids.GPTQ, without(grids.gptq("a", N), "scales"), "a.weight.*no scales"),
        (grids.GPTQ, without(grids.gptq("a", N), "qzeros"), "a.weight.*no qzeros"),
        (grids.AWQ, without(grids.awq("a", N), "qzeros"), "a.weight.*no qzeros"),
        (grids.FP8, {"a.weight": FP8}, "a.weight is F8_E4M3 without weight_scale"),
        (grids.MODELOPT, {"a.weight": np.zeros((4, 8), np.uint8)}, "U8 without weight_scale"),
        (grids.CT, {"b.weight": np.zeros((4, 8), np.float32)}, "no weight is stored quantised"),
        (
            ASYMMETRIC,
            {**PACKED, **without(grids.pack_quantized("b", N, zeros=True), "weight_packed")},
            "b has weight_scale, weight_zero_point, weight_shape and no codes",
        ),
        (
            grids.GPTQ,
            {**grids.gptq("a", N), **without(grids.gptq("b", N), "qweight")},
            "b has qzeros and no codes",
        ),
        (
            ASYMMETRIC,
            {**PACKED, "b.weight": FP8.astype(np.int8), "b.weight_scale": np.ones((4, 1), "f4")},
            r"b has weight_scale and I8 \[4, 8\] for codes",
        ),
        (
            ASYMMETRIC,
            {**PACKED, "a.weight": np.zeros((16, 64), np.float32)},
            "a.weight is stored twice: as F32, and quantised as a.weight_packed",
        ),
    ],
)
def test_a_missing_part(tmp_path: Path, config: Any, tensors: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        read(tmp_path / "m", config, tensors)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("layout", ["ct", "gptq", "awq", "fp8"])
def test_scales_that_are_no_numbers(tmp_path: Path, value: float, layout: str) -> None:
    tensors, config = {
        "ct": (dict(PACKED), ASYMMETRIC),
        "gptq": (grids.gptq("a", N), grids.GPTQ),
        "awq": (grids.awq("a", N), grids.AWQ),
        "fp8": ({"a.weight": FP8, "a.weight_scale_inv": np.ones((1, 1), np.float32)}, grids.FP8),
    }[layout]
    role = {"ct": "a.weight_scale", "fp8": "a.weight_scale_inv"}.get(layout, "a.scales")
    scales = tensors[role].copy()
    scales.reshape(-1)[-1] = value
    with pytest.raises(CheckpointError, match=r"a\.weight: the scale of block \(\d+, \d+\) is"):
        read(tmp_path / "m", config, {**tensors, role: scales})


@pytest.mark.parametrize("whole", [0.0, np.nan, np.inf])
def test_a_global_scale_that_is_no_divisor(tmp_path: Path, whole: float) -> None:
    tensors = {
        "a.weight_packed": np.zeros((2, 8), np.uint8),
        "a.weight_scale": np.ones((2, 1), ml_dtypes.float8_e4m3fn),
        "a.weight_global_scale": np.array([whole], np.float32),
    }
    said = "the scale of block" if whole == 0 else f"weight_global_scale is {whole}"
    with pytest.raises(CheckpointError, match=said):
        read(tmp_path / "m", grids.NVFP4, tensors)


def test_zero_and_negative_steps_are_valid(tmp_path: Path) -> None:
    n = Numbers(4, 64, 32)
    n.scales[:] = np.array([[0.0, -0.5], [-0.0, 0.25], [-1, -2], [0, 0]])
    model = open_quantised(grids.folder(tmp_path / "m", grids.CT, grids.pack_quantized("a", n)))
    assert model.matrix("a.weight").still == 4
    assert model.identity().still_blocks == 4


def test_a_code_out_of_range(tmp_path: Path) -> None:
    weight = FP8.view(np.uint8).copy()
    weight[1, 2] = 0x7F
    tensors = {
        "a.weight": weight.view(ml_dtypes.float8_e4m3fn),
        "a.weight_scale_inv": np.ones((1, 1), np.float32),
    }
    with pytest.raises(CheckpointError, match=r"a\.weight: a code is NaN, out of E4M3's range"):
        read(tmp_path / "m", grids.FP8, tensors)


@pytest.mark.parametrize("value", [2, -2, 1 << 30])
def test_a_column_of_no_group(tmp_path: Path, value: int) -> None:
    tensors = grids.gptq("a", N)
    tensors["a.g_idx"][5] = value
    with pytest.raises(CheckpointError, match=r"a\.weight: g_idx names group -?\d+ of 2"):
        read(tmp_path / "m", grids.GPTQ, tensors)


@pytest.mark.parametrize(
    ("config", "tensors", "said"),
    [
        ({**grids.GPTQ, "checkpoint_format": "marlin"}, grids.gptq("a", N), "'marlin' of one"),
        ({**grids.GPTQ, "is_marlin_format": True}, grids.gptq("a", N), "of one kernel"),
        ({**grids.AWQ, "version": "gemv"}, grids.awq("a", N), "'gemv' of one kernel"),
        ({**grids.AWQ, "version": "marlin"}, grids.awq("a", N), "'marlin' of one kernel"),
        ({**ASYMMETRIC, "format": "marlin-24"}, PACKED, "in the layout marlin-24"),
        (
            grids.GPTQ,
            {"a.B": np.zeros(4, np.int32), "a.s": np.zeros(4, np.float16),
             "a.workspace": np.zeros(4, np.int32)},
            "a.B is in Marlin's layout",
        ),
        (
            ASYMMETRIC,
            {**PACKED, "a.weight_scale_swizzled": np.zeros(3, np.uint8)},
            "weight_scale_swizzled is swizzled for one kernel",
        ),
        (
            grids.MODELOPT,
            {"a.weight": np.zeros((8, 16), np.uint8), "a.weight_scale_2": np.ones((), np.float32),
             "a.weight_scale": np.ones((128, 4), ml_dtypes.float8_e4m3fn)},
            "a.weight_scale is swizzled into tiles of 128 x 4",
        ),
        (
            grids.NVFP4,
            {"a.weight_packed": np.zeros((4, 16), np.uint8),
             "a.weight_scale": np.zeros((4, 1), np.uint8)},
            "mxfp4-pack-quantized is not read",
        ),
        ({**grids.GPTQ, "bits": 3}, grids.gptq("a", N), "GPTQ of 3 bits is not read"),
        ({**grids.GPTQ, "dynamic": {"x": {}}}, grids.gptq("a", N), "`dynamic`"),
        ({**grids.GPTQ, "bits": [4]}, grids.gptq("a", N), "is not read"),
        ({**ASYMMETRIC, "config_groups": {"g": 1}}, PACKED, "config_groups do not say"),
        ({**ASYMMETRIC, "config_groups": None}, PACKED, "config_groups do not say"),
        ({**grids.AWQ, "bits": 8}, grids.awq("a", N), "AWQ of 8 bits is not read"),
    ],
)  # fmt: skip
def test_layouts_of_one_kernel_and_others(
    tmp_path: Path, config: Any, tensors: dict[str, Any], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        read(tmp_path / "m", config, tensors)


def test_awq_of_modelopt_is_refused_by_its_tensors(tmp_path: Path) -> None:
    """`pre_quant_scale: true` stands in the configuration of plain INT4 too; tensors decide."""
    tensors = {
        "a.weight": np.zeros((4, 32), np.uint8),
        "a.weight_scale": np.ones((8, 1), np.float32),
    }
    config = {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "pre_quant_scale": True}
    read(tmp_path / "plain", config, tensors)
    with pytest.raises(CheckpointError, match=r"a\.pre_quant_scale: AWQ scaled the columns"):
        read(tmp_path / "m", config, {**tensors, "a.pre_quant_scale": np.ones(32, np.float32)})


@pytest.mark.parametrize(
    ("role", "value"),
    [
        ("a.weight_scale", np.ones((16, 3), np.float16)),
        ("a.weight_scale", np.ones((16, 2), np.float64)),
        ("a.weight_zero_point", np.zeros((16, 2), np.int32)),
        ("a.weight_packed", np.zeros((16, 9), np.int32)),
        ("a.weight_shape", np.array([15, 64])),
        ("a.weight_shape", np.array([16])),
    ],
)
def test_parts_of_other_sizes(tmp_path: Path, role: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"a(\.weight)?: "):
        read(tmp_path / "m", ASYMMETRIC, {**PACKED, role: value})


def test_a_type_of_gguf_that_is_not_read(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    number = gguf.GGMLQuantizationType.MXFP4
    data = gguf.quants.quantize(np.ones((4, 32), np.float32), number)
    writer.add_tensor("blk.0.ffn_up.weight", data, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_up\.weight is MXFP4"):
        open_quantised(path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CheckpointError, match="its header ends"):
        open_quantised(path)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("split.count", 2, "is one of the 2 parts of a model"),
        ("general.type", "adapter", "is a GGUF file of the type 'adapter', and no model"),
    ],
)
def test_a_gguf_file_that_is_no_whole_model(
    tmp_path: Path, key: str, value: Any, said: str
) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    if isinstance(value, int):
        writer.add_uint16(key, value)
    else:
        writer.add_string(key, value)
    number = gguf.GGMLQuantizationType.Q8_0
    data = gguf.quants.quantize(np.ones((4, 32), np.float32), number)
    writer.add_tensor("a.weight", data, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=said):
        open_quantised(path)


def test_what_is_no_onnx_graph(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    (tmp_path / "m.onnx").write_bytes(b"no graph")
    with pytest.raises(CheckpointError, match="is no ONNX model"):
        open_quantised(tmp_path / "m.onnx")


def test_a_float_model_is_not_taken_for_a_quantised_one(tmp_path: Path) -> None:
    place = grids.folder(tmp_path / "m", None, {"a.weight": np.ones((4, 8), np.float32)})
    assert not is_quantised(place)
    with pytest.raises(CheckpointError, match="holds no quantised model"):
        open_quantised(place)
    (place / "config.json").write_text("no JSON")
    assert not is_quantised(place)
    (place / "quantize_config.json").write_text(json.dumps(grids.GPTQ))
    assert is_quantised(place)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (r"re:(a|b)+", "takes too long to match"),
        ("re:(", "no regular expression"),
        ("re:" + "(" * 3000 + ")" * 3000, "no regular expression"),
    ],
)
def test_an_expression_of_a_stranger(
    tmp_path: Path, target: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("regex")
    if "too long" in words:  # once the time of a file's expressions is used up
        monkeypatch.setattr("kilodelta.expressions.SECONDS", 0.0)
    config = grids.ct_config()
    config["config_groups"]["group_0"]["targets"] = [target]
    name = "a" * 60
    with pytest.raises(CheckpointError, match=words):
        read(tmp_path / "m", config, grids.pack_quantized(name, N))


@pytest.mark.parametrize("odd", [float("nan"), float("-inf"), "\ud800"])
def test_a_configuration_without_a_spelling(tmp_path: Path, odd: Any) -> None:
    config = {**grids.ct_config(), "note": odd}
    place = grids.folder(tmp_path / "m", config, grids.pack_quantized("a", N))
    with pytest.raises(CheckpointError, match="no canonical spelling"):
        open_quantised(place).identity(threads=1)


def test_a_block_that_no_matrix_has(tmp_path: Path) -> None:
    config = grids.ct_config(group_size=10**30)
    with pytest.raises(CheckpointError, match=r"larger than any matrix|not fit|shape"):
        read(tmp_path / "m", config, grids.pack_quantized("a", Numbers(16, 32, 32)))


def gguf_bytes(*, tensors: int = 0, pairs: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + rest


def gguf_text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def gguf_value(kind: int, inner: int, count: int) -> bytes:
    return gguf_text(b"k") + struct.pack("<IIQ", kind, inner, count)


def gguf_tensor(*sizes: int, kind: int = 2, begin: int = 0, name: bytes = b"a") -> bytes:
    form = f"<I{len(sizes)}QIQ"
    return gguf_text(name) + struct.pack(form, len(sizes), *sizes, kind, begin)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "states 4 bytes"),
        (b"GGML" + bytes(64), "begins otherwise"),
        (gguf_bytes(version=3 << 24), "little-endian"),
        (gguf_bytes(tensors=1000), "its header ends"),
        (gguf_bytes(pairs=1000), "its header ends"),
        (gguf_bytes(pairs=1, rest=struct.pack("<Q", 1000)), "its header ends"),
        # Arrays of more bytes, texts or arrays than follow.
        *(
            (
                gguf_bytes(pairs=1, rest=gguf_text(b"k") + struct.pack("<IIQ", 9, kind, 1000)),
                words,
            )
            for kind, words in (
                (0, "its header ends"),
                (8, "its header ends"),
                (9, "array of type 9"),
            )
        ),
        (gguf_bytes(pairs=1, rest=gguf_text(b"k") + struct.pack("<I", 13)), "value of type 13"),
        (gguf_bytes(tensors=1, rest=gguf_text(b"\xff")), "not UTF-8"),
        (gguf_bytes(tensors=2, rest=gguf_tensor(32, 1) * 2), "twice"),
        (gguf_bytes(tensors=1, rest=gguf_tensor(*[1] * 5)), "5 dimensions"),
        (gguf_bytes(tensors=1, rest=gguf_tensor(32, 1, kind=999)), "type 999"),
        (gguf_bytes(tensors=1, rest=gguf_tensor(33, 1)), "rows of 33"),
        (gguf_bytes(tensors=1, rest=gguf_tensor(1 << 20, 1 << 20)), "ends at byte"),
        (gguf_bytes(tensors=1, rest=gguf_tensor(32, 1, begin=1 << 40)), "ends at byte"),
    ],
)
def test_a_damaged_gguf_file_is_a_sentence(tmp_path: Path, data: bytes, words: str) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=words):
        open_quantised(tmp_path / "m.gguf")


@pytest.mark.parametrize("package", ["gguf", "onnx"])
def test_a_package_is_asked_for_once_there_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    place = tmp_path / f"m.{package}"
    with pytest.raises(CheckpointError, match="cannot be opened"):
        open_quantised(place)
    place.write_bytes(gguf_bytes())
    with pytest.raises(MissingPackageError, match=f"{package} is not installed"):
        open_quantised(place)


def _external_pipe(place: Path) -> None:
    import onnx

    grids.matmul_graph(place, {"a": N})
    model = onnx.load(place)
    onnx.save(model, place, save_as_external_data=True, location="a.data", size_threshold=0)
    (place.parent / "a.data").unlink()
    os.mkfifo(place.parent / "a.data")


def _damaged(change: Any) -> Any:
    def write(place: Path) -> None:
        import onnx

        model = onnx.load(grids.matmul_graph(place, {"a": N}))
        change(model.graph)
        onnx.save(model, place)

    return write


def _attribute(graph: Any, name: str) -> Any:
    return next(a for a in graph.node[0].attribute if a.name == name)


def _store_bits(graph: Any, bits: int) -> None:
    """Claim a width of codes, with a constant of the size that follows from it."""
    from onnx import numpy_helper

    _attribute(graph, "bits").i = bits
    codes = graph.initializer[0]
    codes.CopyFrom(numpy_helper.from_array(np.zeros((16, 2, 4 * bits), np.uint8), codes.name))


@pytest.mark.parametrize(
    "write",
    [
        os.mkfifo,
        _external_pipe,
        _damaged(lambda graph: graph.node[0].ClearField("input")),
        _damaged(lambda graph: graph.node[0].ClearField("attribute")),
        _damaged(lambda graph: graph.initializer[0].dims.append(-1)),
        _damaged(lambda graph: graph.initializer[0].ClearField("data_type")),
        _damaged(lambda graph: setattr(graph.initializer[1], "raw_data", b"123")),
        _damaged(lambda graph: _attribute(graph, "K").ClearField("type")),
        _damaged(lambda graph: setattr(_attribute(graph, "K"), "type", 1)),
        _damaged(lambda graph: setattr(_attribute(graph, "block_size"), "type", 7)),
        _damaged(lambda graph: setattr(_attribute(graph, "bits"), "type", 7)),
        _damaged(lambda graph: _store_bits(graph, 0)),
        _damaged(lambda graph: _store_bits(graph, 9)),
        _damaged(lambda graph: setattr(_attribute(graph, "block_size"), "i", 0)),
        _damaged(lambda graph: setattr(_attribute(graph, "block_size"), "i", -32)),
        _damaged(lambda graph: setattr(_attribute(graph, "N"), "i", -(2**63))),
    ],
)
def test_a_graph_that_breaks_the_rules_is_a_sentence(tmp_path: Path, write: Any) -> None:
    pytest.importorskip("onnx")
    write(tmp_path / "m.onnx")
    with pytest.raises(CheckpointError):
        _read(tmp_path / "m.onnx")


def test_a_name_that_is_not_utf_8_in_a_graph(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    place = grids.matmul_graph(tmp_path / "m.onnx", {"weight": N})
    place.write_bytes(place.read_bytes().replace(b"weight_scales", b"weight_scal\xff\xfe"))
    with pytest.raises(CheckpointError):
        _read(place)


def _read(place: Path) -> None:
    open_quantised(place).identity(threads=1)
