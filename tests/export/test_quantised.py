"""Export of quantised bases: graphs hold the merged codes, and compute their exact values."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx
import onnx_ir as ir
import onnxruntime as ort
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from kilodelta.cli import main
from kilodelta.device import bundle
from kilodelta.errors import BaseMismatchError, ExportError, InputError, ProofError, QualityError
from kilodelta.export.merge.checkpoint import merge
from kilodelta.export.onnx.save import save
from kilodelta.export.pipeline import export
from kilodelta.export.quantised.checks import require_grids
from kilodelta.export.quantised.constants import (
    require_exact,
    require_no_minima,
    require_runnable,
)
from kilodelta.export.quantised.engines import require_engine
from kilodelta.export.quantised.graph import put_codes, settled
from kilodelta.export.quantised.nvfp4 import scale_pairs
from kilodelta.export.quantised.proof import prove_codes
from kilodelta.format.methods import Lora
from kilodelta.format.targets import Patterns
from kilodelta.grid import Matrix, QuantisedModel, open_quantised
from kilodelta.grid.codes import E2M1, E4M3, e4m3_values, integer_kind
from kilodelta.grid.identity import matrix_digest
from kilodelta.grid.quantise import quantise_folder
from kilodelta.merging.build import Recipe, build, quantise_target
from kilodelta.verify import verify
from kilodelta.verify.digests.proof import prove
from tests.support import grids, making, pico, seq2seq
from tests.support.grids import Numbers

ROWS, COLUMNS = 48, 64
EXACT = 1e-6  # relative L2: float32 rounds each of 64 products and sums to 6e-8


def quantised(place: Path, case: str, columns: int = COLUMNS) -> QuantisedModel:
    """A model of one weight `w.weight` (48, columns)."""
    if case in ("fp8", "nvfp4"):
        values = np.random.default_rng(2).normal(size=(ROWS, columns)).astype(np.float32)
        values[0] = 0  # of NVFP4 four blocks without a scale
        floats = making.folder(
            place / "floats", {"w.weight": ("F32", values.shape, values.tobytes())}
        )
        quantise_folder(floats, place / case, case, "w.weight".__eq__)
        return open_quantised(place / case)
    bits, zeros = (8 if case == "int8" else 4), case == "asymmetric"
    config = grids.ct_config(num_bits=bits, symmetric=not zeros)
    numbers = Numbers(ROWS, columns, 32, bits=bits, zeros=zeros)
    if case == "int8":
        numbers.scales = np.abs(numbers.scales) + np.float16(2.0**-10)
    tensors = grids.pack_quantized("w", numbers, zeros=zeros)
    return open_quantised(grids.folder(place / case, config, tensors))


def float_graph(kind: str, columns: int = COLUMNS, dtype: str = "float32") -> Any:
    """x (b, columns) times the transpose of `w.weight`, by one of three ways of torch."""
    real = TensorProto.FLOAT if dtype == "float32" else TensorProto.FLOAT16
    value = helper.make_tensor_value_info
    weight = numpy_helper.from_array(np.zeros((ROWS, columns), dtype), "w.weight")
    bias = numpy_helper.from_array(np.arange(ROWS).astype(dtype), "w.bias")
    inputs = [value("x", real, ["b", columns])]
    outputs = [value("y", real, ["b", ROWS])]
    if kind == "gemm":
        nodes = [helper.make_node("Gemm", ["x", "w.weight", "w.bias"], ["y"], transB=1)]
    else:
        nodes = [
            helper.make_node("Transpose", ["w.weight"], ["turned"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", "turned"], ["y"]),
        ]
    if kind == "tied":
        nodes.append(helper.make_node("Gather", ["w.weight", "ids"], ["rows"]))
        inputs.append(value("ids", TensorProto.INT64, ["n"]))
        outputs.append(value("rows", real, ["n", columns]))
    held = [weight, bias] if kind == "gemm" else [weight]
    graph = helper.make_graph(nodes, "g", inputs, outputs, held)
    opset = [helper.make_opsetid("", 20)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opset, ir_version=10))


def written(place: Path, model: QuantisedModel, form: str, kind: str = "matmul") -> Path:
    """A graph with the codes of a model, proved."""
    graph = float_graph(kind, model.of("w.weight").shape[1])
    assert put_codes(graph, model, form=form, dtype="float32") == ("w.weight",)
    path = place / f"{form}-{kind}.onnx"
    save(graph, path)
    prove_codes(path, model, ("w.weight",))
    onnx.checker.check_model(path)
    return path


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def run(path: Path, **feed: Any) -> list[Any]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return list(session.run(None, feed))


def off(found: Any, wanted: Any) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("form", ["matmulnbits", "qdq"])
@pytest.mark.parametrize("case", ["symmetric", "asymmetric", "int8", "fp8"])
def test_a_graph_computes_the_exact_values_and_is_the_same_model(
    tmp_path: Path, case: str, form: str
) -> None:
    model = quantised(tmp_path, case)
    path = written(tmp_path, model, form)
    is_nbits = form == "matmulnbits" and case != "fp8"
    assert operators(path) == (
        ["MatMulNBits"] if is_nbits else ["DequantizeLinear", "Transpose", "MatMul"]
    )
    if is_nbits:  # 0 and 4 let ONNX Runtime round activations to int8
        (node,) = onnx.load(path).graph.node
        assert {a.name: a.i for a in node.attribute}["accuracy_level"] == 1
    x = np.random.default_rng(0).normal(size=(5, COLUMNS)).astype(np.float32)
    matrix = model.matrix("w.weight")
    assert off(run(path, x=x)[0], x.astype(np.float64) @ matrix.values().T) < EXACT
    # One logical identity: a file for the one is a file for the other.
    assert matrix_digest("w", open_quantised(path).matrix("w.weight")) == matrix_digest("w", matrix)


@pytest.mark.parametrize("form", ["matmulnbits", "qdq"])
def test_a_partial_last_block_is_right(tmp_path: Path, form: str) -> None:
    model = quantised(tmp_path, "asymmetric", columns=72)
    path = written(tmp_path, model, form)
    x = np.random.default_rng(0).normal(size=(3, 72)).astype(np.float32)
    wanted = x.astype(np.float64) @ model.matrix("w.weight").values().T
    assert off(run(path, x=x)[0], wanted) < EXACT


def test_a_product_with_a_bias_keeps_it(tmp_path: Path) -> None:
    model = quantised(tmp_path, "symmetric")
    path = written(tmp_path, model, "matmulnbits", "gemm")
    assert operators(path) == ["MatMulNBits", "Add"]
    x = np.random.default_rng(0).normal(size=(5, COLUMNS)).astype(np.float32)
    wanted = x.astype(np.float64) @ model.matrix("w.weight").values().T + np.arange(ROWS)
    assert off(run(path, x=x)[0], wanted) < EXACT


@pytest.mark.parametrize("form", ["matmulnbits", "qdq"])
def test_an_embedding_and_the_head_tied_to_it_share_their_codes(tmp_path: Path, form: str) -> None:
    model = quantised(tmp_path, "symmetric")
    path = written(tmp_path, model, form, "tied")
    assert operators(path).count("DequantizeLinear") == 1
    x = np.random.default_rng(0).normal(size=(2, COLUMNS)).astype(np.float32)
    product, rows = run(path, x=x, ids=np.array([7, 0, 47]))
    values = model.matrix("w.weight").values()
    assert off(product, x.astype(np.float64) @ values.T) < EXACT
    assert np.array_equal(rows, values[[7, 0, 47]].astype(np.float32))


def test_a_scale_for_each_row_is_not_computed_in_int8(tmp_path: Path) -> None:
    # ONNX Runtime would take a product with one scale per row in int8, with rounded activations.
    config = grids.ct_config(num_bits=8, strategy="channel", group_size=None)
    tensors = grids.pack_quantized("w", Numbers(ROWS, 60, 60, bits=8))
    model = open_quantised(grids.folder(tmp_path / "rows", config, tensors))
    path = written(tmp_path, model, "matmulnbits")  # 60 is no block of MatMulNBits
    assert operators(path)[0] == "DequantizeLinear"
    x = np.random.default_rng(0).normal(size=(3, 60)).astype(np.float32)
    wanted = x.astype(np.float64) @ model.matrix("w.weight").values().T
    assert off(run(path, x=x)[0], wanted) < EXACT


def test_blocks_of_rows_and_columns_keep_each_weight(tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(0, 120, (ROWS, COLUMNS), np.uint8)
    scales = np.array([[0.5, -0.25], [2.0, 0.125]], np.float32)
    tensors = {"w.weight": codes.view("u1"), "w.weight_scale_inv": scales}
    place = grids.folder(tmp_path / "blocks", {**grids.FP8, "weight_block_size": [32, 32]}, {})
    from kilodelta.files import safetensors
    from kilodelta.files.tensor import RawTensor

    safetensors.write(
        place / "model.safetensors",
        {
            "w.weight": RawTensor(dtype="F8_E4M3", shape=codes.shape, data=codes.reshape(-1)),
            "w.weight_scale_inv": RawTensor.of(tensors["w.weight_scale_inv"]),
        },
    )
    model = open_quantised(place)
    path = written(tmp_path, model, "qdq")
    x = np.random.default_rng(0).normal(size=(3, COLUMNS)).astype(np.float32)
    wanted = x.astype(np.float64) @ model.matrix("w.weight").values().T
    assert off(run(path, x=x)[0], wanted) < EXACT


@pytest.mark.parametrize(
    ("initializer", "what"),
    [("w.weight_Q4", "codes"), ("w.weight_scales", "scales"), ("w.weight_zero_points", "zero")],
)
def test_a_graph_that_holds_other_numbers_is_noticed(
    tmp_path: Path, initializer: str, what: str
) -> None:
    model = quantised(tmp_path, "asymmetric")
    path = written(tmp_path, model, "matmulnbits")
    proto = onnx.load(path)
    (tensor,) = (t for t in proto.graph.initializer if t.name == initializer)
    data = bytearray(tensor.raw_data)
    data[3] ^= 1
    tensor.raw_data = bytes(data)
    onnx.save(proto, path)
    with pytest.raises(ProofError, match=f"w.weight has other {what}"):
        prove_codes(path, model, ("w.weight",))
    with pytest.raises(ProofError, match="v is not there"):
        prove_codes(path, model, ("v",))


FLAT = Matrix(
    kind=integer_kind(4), codes=np.ones((4, 64), np.int8), steps=np.ones((4, 2)), block=(1, 32)
)
NVFP4: dict[str, Any] = {
    "kind": E2M1,
    "codes": np.ones((4, 64), np.uint8),
    "steps": np.ones((4, 4)),
    "block": (1, 16),
}


@pytest.mark.parametrize(
    ("change", "dtype", "text"),
    [
        ({"kind": integer_kind(3)}, "float32", "holds int3 codes"),
        ({**NVFP4, "steps": NVFP4["steps"] * 0.1}, "float32", "NVFP4 scales that are not E4M3"),
        ({**NVFP4, "steps": -NVFP4["steps"]}, "float32", "NVFP4 scales that are not E4M3"),
        ({**NVFP4, "steps": NVFP4["steps"] * (1 + 2.0**-20)}, "float16", "one number of float16"),
        ({**NVFP4, "steps": NVFP4["steps"] * 2.0**-40}, "float16", "one number of float16"),
        ({"order": np.zeros(64, np.int32)}, "float32", "act-order"),
        ({"minima": np.full((4, 2), 0.1)}, "float32", "minima that are no numbers of float32"),
        ({"zeros": np.full((4, 2), 8, np.int16)}, "float32", "from 8 to 8, outside int4"),
        ({"zeros": np.full((4, 2), -9, np.int16)}, "float32", "from -9 to -9"),
        ({"steps": np.full((4, 2), 0.1)}, "float32", "no numbers of float32"),
        ({"steps": np.full((4, 2), 1 + 2.0**-12)}, "float16", "no numbers of float16"),
        ({"steps": np.full((4, 2), 1e6)}, "float16", "no numbers of float16"),
        ({"steps": np.full((4, 2), 1 + 2.0**-9)}, "bfloat16", "no numbers of bfloat16"),
    ],
)
def test_what_a_graph_cannot_hold_is_refused(change: dict[str, Any], dtype: str, text: str) -> None:
    require_exact("w", FLAT, dtype)
    with pytest.raises(ExportError, match=text) as caught:
        require_exact("w", replace(FLAT, **change), dtype)
    assert caught.value.what.startswith("w ")
    assert "no number" not in text or ("--dtype fp32" in caught.value.fix) == (dtype != "float32")


def test_nvfp4_without_an_engine_is_refused_as_that_whatever_its_scales(tmp_path: Path) -> None:
    tensors = {
        "a.weight_packed": np.zeros((2, 8), np.uint8),
        "a.weight_scale": np.ones((2, 1), ml_dtypes.float8_e4m3fn),
        "a.weight_global_scale": np.full(1, 13248, np.float32),
    }
    base = open_quantised(grids.folder(tmp_path / "m", grids.NVFP4, tensors))
    with pytest.raises(ExportError, match="NVFP4 codes, with which ONNX Runtime computes on no"):
        require_grids(base, ("float32",))


def test_minima_have_no_place_in_dequantize_linear() -> None:
    require_no_minima("w", replace(FLAT, minima=np.zeros((4, 2))))
    with pytest.raises(ExportError, match="w has blocks with minima"):
        require_no_minima("w", replace(FLAT, minima=np.ones((4, 2))))


@pytest.mark.parametrize(
    ("change", "gpus", "text"),
    [
        ({}, ("sm75",), "INT4 codes, which TensorRT builds from sm80 on, not for sm75"),
        ({"kind": E4M3}, ("sm89", "sm86"), "FP8 codes, .* not for sm86"),
        ({"zeros": np.ones((4, 2), np.int16)}, ("sm89",), "quantised asymmetrically"),
        ({"codes": np.ones((4, 56), np.int8)}, ("sm89",), "56 columns in blocks of 32"),
        ({"block": (1, 8), "steps": np.ones((4, 8))}, ("sm89",), "INT4 blocks of 8 columns"),
        ({"kind": integer_kind(3)}, ("sm120",), "int3 codes"),
        (
            NVFP4,
            ("sm120", "sm89"),
            "NVFP4 codes, which TensorRT builds from sm120 on, not for sm89",
        ),
        ({**NVFP4, "block": (1, 64)}, ("sm120",), "NVFP4 blocks of 64 columns"),
        (
            {"kind": integer_kind(8), "steps": -FLAT.steps},
            ("sm89",),
            "INT8 scales that are negative",
        ),
        (
            {"kind": E4M3, "steps": 0 * FLAT.steps},
            ("sm89",),
            "FP8 scales that are negative or zero",
        ),
    ],
)
def test_grids_without_an_engine_are_refused_by_their_reason(
    change: dict[str, Any], gpus: tuple[str, ...], text: str
) -> None:
    require_engine("w", replace(FLAT, zeros=np.zeros((4, 2), np.int16)), ("sm80", "sm120"))
    with pytest.raises(ExportError, match=text) as caught:
        require_engine("w", replace(FLAT, **change), gpus)
    assert "FP8" in caught.value.fix
    assert "float16" in caught.value.fix


def test_minima_have_no_engine_and_the_message_says_what_to_do() -> None:
    minima = replace(FLAT, minima=np.ones((4, 2)))
    with pytest.raises(ExportError, match=r"w has blocks with minima .* TensorRT takes neith") as e:
        require_engine("w", minima, ("sm89",))
    assert "quantise_folder(" in e.value.fix
    assert "rebase" in e.value.fix


def test_onnx_runtime_runs_no_nvfp4() -> None:
    require_runnable("w", FLAT)
    with pytest.raises(ExportError, match="w holds NVFP4 codes, with which ONNX Runtime") as error:
        require_runnable("w", replace(FLAT, **NVFP4))
    assert "--tensorrt sm120" in error.value.fix


@pytest.mark.parametrize("whole", [2.0**-12, 3.0, 0.015625 * 1.9999, float(np.float32(0.0123))])
def test_nvfp4_scales_are_taken_apart_exactly(whole: float) -> None:
    codes = np.random.default_rng(0).integers(0, 0x7F, (8, 40)).astype(np.uint8)
    codes[0, 0] = 0x7E  # 448: what a quantiser makes the largest
    steps = e4m3_values(codes) * np.float64(np.float32(whole))
    pairs = list(scale_pairs(steps))
    assert float(np.float32(whole)) in [one for _, one in pairs]
    for scales, one in pairs:
        assert (e4m3_values(scales) * one == steps).all()


def test_a_graph_holds_nvfp4_in_two_levels(tmp_path: Path) -> None:
    model = quantised(tmp_path, "nvfp4")
    path = written(tmp_path, model, "qdq")
    graph = onnx.load(path)
    assert graph.opset_import[0].version == 23
    assert graph.ir_version == 11
    outer, inner = (
        next(node for node in graph.graph.node if node.input[0] == name)
        for name in ("w.weight_DQ_Q4", "w.weight_scales")
    )
    assert outer.input[1] == inner.output[0]
    types = {one.name: one.data_type for one in graph.graph.initializer}
    assert types["w.weight_DQ_Q4"] == TensorProto.FLOAT4E2M1
    assert types["w.weight_scales"] == TensorProto.FLOAT8E4M3FN
    assert types[inner.input[1]] == TensorProto.FLOAT
    x = np.random.default_rng(1).normal(size=(5, COLUMNS)).astype(np.float32)
    [y] = ReferenceEvaluator(str(path)).run(None, {"x": x})
    wanted = x.astype(np.float64) @ model.matrix("w.weight").values().T
    assert np.linalg.norm(y - wanted) <= EXACT * np.linalg.norm(wanted)


def test_the_form_suits_what_the_graph_is_for() -> None:
    assert settled("auto", for_engines=False) == "matmulnbits"
    assert settled("auto", for_engines=True) == "qdq"
    with pytest.raises(InputError, match="TensorRT does not parse MatMulNBits"):
        settled("matmulnbits", for_engines=True)
    with pytest.raises(InputError, match="'blocks' is no form"):
        settled("blocks", for_engines=False)


@pytest.mark.parametrize(
    ("case", "gpu"),
    [("symmetric", "sm80"), ("int8", "sm86"), ("fp8", "sm89"), ("nvfp4", "sm120")],
)
def test_an_engine_is_built_and_holds_the_codes(tmp_path: Path, case: str, gpu: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    from kilodelta.export.tensorrt.build import build as build_engine
    from kilodelta.export.tensorrt.flavour import RTX, choose

    model = quantised(tmp_path, case)
    matrix = model.matrix("w.weight")
    require_engine("w.weight", matrix, (gpu,))
    path = written(tmp_path, model, settled("auto", for_engines=True))
    shapes = ((1, COLUMNS), (4, COLUMNS), (8, COLUMNS))
    engine, trt = tmp_path / "model.engine", choose(RTX, (gpu,), ("float32",))
    build_engine(trt, path, engine, capabilities=(gpu,), profile={"x": shapes})
    # INT4 codes lie in an engine as (out, in), the others as (in, out).
    codes = matrix.codes if case == "symmetric" else matrix.codes.T
    flat = np.ascontiguousarray(codes).view(np.uint8).reshape(-1)
    packed = flat[0::2] & 15 | (flat[1::2] & 15) << 4 if matrix.kind.bits == 4 else flat
    assert packed.tobytes() in engine.read_bytes()


def is_linear(name: str) -> bool:
    return name.endswith(".weight") and ("dense" in name or ".self." in name)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantised encoder `int4`, a file for it, and texts."""
    pytest.importorskip("transformers")
    place = tmp_path_factory.mktemp("quantised")
    base = pico.bert(place / "base", width=32, inner=32, layers=1)
    quantise_folder(base, place / "int4", "int4-g32", is_linear)
    save_file(place / "int4", place / "task.kd")
    (place / "texts.txt").write_text("\n".join(pico.TEXTS) + "\n")
    return place


def save_file(base: Path, file: Path, size: float = 0.2) -> None:
    rng, lora = np.random.default_rng(3), Lora(rank=2)
    own = {
        name: quantise_target(
            lora,
            {
                "A": rng.normal(size=(2, weight.shape[1])) * size,
                "B": rng.normal(size=(weight.shape[0], 2)) * size,
            },
            8,
        )
        for name, weight in open_quantised(base).stored.items()
    }
    patterns = Patterns(include=tuple(own), exclude=())
    build(base, Recipe(method=lora, patterns=patterns, bits=8), own).save(file)


def call(*words: Any) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_an_export_is_proved_and_verified(place: Path, tmp_path: Path) -> None:
    done = call("export", place / "int4", place / "task.kd", "-o", tmp_path / "out", "--onnx")
    assert done.exit_code == 0, done.output
    kinds = operators(tmp_path / "out" / "model.fp32.onnx")
    assert kinds.count("MatMulNBits") == 7
    assert "DequantizeLinear" not in kinds
    checked = call(
        "verify", place / "int4", place / "task.kd", tmp_path / "out",
        "--inputs", place / "texts.txt", "--require", "ort",
    )  # fmt: skip
    assert checked.exit_code == 0, checked.output
    # The graph holds the very codes that the file promises.
    graph = open_quantised(tmp_path / "out" / "model.fp32.onnx")
    assert call("merge", place / "int4", place / "task.kd", "-o", tmp_path / "m").exit_code == 0
    merged = open_quantised(tmp_path / "m").identity().weights
    assert graph.identity().weights == merged


def test_an_nvfp4_base_becomes_an_engine_for_gpus_that_have_its_codes(
    place: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    base, file, out = tmp_path / "nvfp4", tmp_path / "task.kd", tmp_path / "out"
    quantise_folder(place / "base", base, "nvfp4", is_linear)
    save_file(base, file)
    for gpus, text in (
        (["sm120", "sm89"], "from sm120 on, not for sm89"),
        ([], "computes on no CPU"),
    ):
        with pytest.raises(ExportError, match=text):
            export(base, file, out, tensorrt=gpus)
        assert not out.exists()
    done = export(base, file, out, onnx=True, tensorrt="sm120")
    assert [one.kind for one in done.manifest.artefacts] == ["onnx", "engine"]
    assert call("merge", base, file, "-o", tmp_path / "merged").exit_code == 0
    graph = open_quantised(out / "model.fp32.onnx").identity()
    assert graph.weights == open_quantised(tmp_path / "merged").identity().weights
    checked = call("verify", base, file, out, "--inputs", place / "texts.txt", "--json")
    assert checked.exit_code == 0, checked.output
    assert "kernel" in checked.output or "implementation" in checked.output  # none on a CPU
    for mode in ("patch", "adapter"):
        with pytest.raises(ExportError, match="computes on no CPU") as error:
            bundle(base, tmp_path / "device", mode=mode)
        assert "bundle --engine sm120" in error.value.fix
        with pytest.raises(ExportError, match="from sm120 on, not for sm89"):
            bundle(base, tmp_path / "device", mode=mode, engine=["sm89"])
    assert not (tmp_path / "device").exists()


def test_messages_name_the_quantised_base(place: Path, tmp_path: Path) -> None:
    # The model is opened from a temporary copy in floats, which is gone when they are read.
    base = shutil.copytree(place / "int4", tmp_path / "base")
    assert call("export", base, place / "task.kd", "-o", tmp_path / "out", "--onnx").exit_code == 0
    for path in base.glob("tokenizer*"):
        path.unlink()
    asked = (base, place / "task.kd", "--inputs", place / "texts.txt")
    for done in (
        call("verify", *asked[:2], tmp_path / "out", *asked[2:]),
        call("export", *asked, "-o", tmp_path / "again", "--onnx"),
    ):
        assert done.exit_code == 9, done.output
        assert f"{base} has no tokenizer" in done.output.replace("\n", " ")
        assert "dequantised" not in done.output


def test_what_does_not_fit_is_refused_and_nothing_written(place: Path, tmp_path: Path) -> None:
    out, base, file = tmp_path / "out", place / "int4", place / "task.kd"
    with pytest.raises(BaseMismatchError, match="made for a quantised base"):
        export(place / "base", file, out)
    with pytest.raises(ExportError, match="no numbers of float16"):
        export(base, file, out, dtype="fp16")
    with pytest.raises(InputError, match="TensorRT does not parse MatMulNBits"):
        export(base, file, out, tensorrt="sm89", blocks="matmulnbits")
    save_file(base, tmp_path / "small.kd", size=1e-3)
    with pytest.raises(QualityError, match=r"--min-changed 0") as caught:
        export(base, tmp_path / "small.kd", out)
    assert "changes 0 of" in caught.value.what
    assert not out.exists()


def test_codes_lie_in_external_data_and_in_a_repository(place: Path, tmp_path: Path) -> None:
    base, repository = place / "int4", tmp_path / "repository"
    done = export(base, place / "task.kd", tmp_path / "out", external_data=True, triton=repository)
    (graph,) = done.manifest.artefacts
    assert [file.file for file in graph.files] == ["model.fp32.onnx", "model.fp32.onnx.data"]
    served = next((tmp_path / "repository").rglob("model.onnx"))
    written = open_quantised(tmp_path / "out" / "model.fp32.onnx").identity()
    assert open_quantised(served).identity().weights == written.weights


@pytest.mark.slow
def test_a_graph_with_a_cache_holds_the_codes(tmp_path: Path) -> None:
    base = pico.llama(tmp_path / "base")
    quantise_folder(base, tmp_path / "fp8", "fp8", lambda name: name.endswith("proj.weight"))
    save_file(tmp_path / "fp8", tmp_path / "task.kd")
    export(tmp_path / "fp8", tmp_path / "task.kd", tmp_path / "out", kv_cache=True)
    graph = tmp_path / "out" / "model.fp32.onnx"
    assert operators(graph).count("DequantizeLinear") == 14
    call("merge", tmp_path / "fp8", tmp_path / "task.kd", "-o", tmp_path / "merged")
    merged = open_quantised(tmp_path / "merged")
    for name in merged.stored:  # the operator cuts its blocks otherwise: each number counts
        ours, theirs = open_quantised(graph).matrix(name), merged.matrix(name)
        assert np.array_equal(ours.values(), theirs.values())


def test_blocks_of_a_float_base_are_refused(tmp_path: Path) -> None:
    golden, out = Path("tests/golden/0.1.0"), tmp_path / "out"
    with pytest.raises(InputError, match=r"--blocks qdq chooses .* is a float model"):
        export(golden / "base.safetensors", golden / "nola-8.kd", out, blocks="qdq")
    assert not out.exists()


def test_blocks_of_a_float_base_have_no_place_in_a_bundle(tmp_path: Path) -> None:
    base = Path("tests/golden/0.1.0/base.safetensors")
    with pytest.raises(InputError, match=r"--blocks matmulnbits chooses .* is a float model"):
        bundle(base, tmp_path / "out", mode="patch", blocks="matmulnbits")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t5", "whisper"])
def test_an_encoder_decoder_with_a_quantised_base(tmp_path: Path, kind: str) -> None:
    """Whisper, and T5 with its embedding quantised: distilled, merged, exported, and run."""
    from kilodelta.compress import Options, compress

    base = getattr(seq2seq, kind)(tmp_path / "base", width=32)
    tuned = pico.tuned(base, tmp_path / "tuned", size=0.3)
    quantise_folder(base, tmp_path / "q", "int4-g32", is_product)
    inputs = pairs(tmp_path) if kind == "t5" else sounds(tmp_path)
    options = Options(method=Lora(rank=2), steps=4, batch=4, held_out=4)
    compress(tmp_path / "q", tuned, tmp_path / "f.kd", inputs=inputs, options=options)
    merge(tmp_path / "q", tmp_path / "f.kd", tmp_path / "merged")
    prove(tmp_path / "q", tmp_path / "f.kd", tmp_path / "merged")
    for cached in (False, True):
        out = tmp_path / f"out-{cached}"
        export(tmp_path / "q", tmp_path / "f.kd", out, kv_cache=cached)
        done = verify(tmp_path / "q", tmp_path / "f.kd", [out], inputs=inputs, generate=4)
        assert done.failure is None


def is_product(name: str) -> bool:
    """Whether a tensor of a T5 or a Whisper is multiplied by, or is T5's embedding."""
    parts = ("q", "k", "v", "o", "wi", "wo", "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    return name == "shared.weight" or (name.endswith(".weight") and name.split(".")[-2] in parts)


def pairs(place: Path) -> Path:
    """Texts with targets, no two alike."""
    words = ("rain", "a", "the", "river")
    rows = [{"text": f"{a} {b} runs", "target": c} for a in words for b in words for c in words[:2]]
    (place / "in.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return place / "in.jsonl"


def sounds(place: Path) -> Path:
    """Features of a second of sound, and what is said."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((20, 8, 100), dtype=np.float32)
    ids = rng.integers(4, pico.VOCABULARY, (20, 6))
    np.savez(place / "in.npz", input_features=features, decoder_input_ids=ids)
    return place / "in.npz"
