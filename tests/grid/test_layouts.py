"""Every layout gives the exact values: against scalar loops, and against the field's libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from kilodelta.export.quantised.constants import require_exact
from kilodelta.files.tensor import RawTensor
from kilodelta.grid import QuantisedModel, open_quantised
from kilodelta.grid.bits import pack_bits, replace_bits, unpack_bits
from kilodelta.grid.codes import E2M1, E4M3, NOT_A_NUMBER
from kilodelta.grid.layouts import LAYOUTS, DequantizeLinear, GgufBlocks, MatMulNBits
from kilodelta.grid.layouts.gguf_blocks import TYPES
from tests.support import grids
from tests.support.grids import Numbers

RNG = np.random.default_rng(11)


def raw(arrays: dict[str, Any]) -> dict[str, RawTensor]:
    return {role: RawTensor.of(np.ascontiguousarray(array)) for role, array in arrays.items()}


def recoded(model: QuantisedModel, name: str) -> tuple[RawTensor, RawTensor]:
    """The stored tensor of the codes, and what writing the same codes makes of it."""
    parts, layout = model.parts(name), model.of(name).layout
    return parts[layout.codes_in], layout.recode(parts, model.matrix(name).codes)


def exact(value: float) -> float:
    return value + 0.0  # a weight of -0.0 is 0.0


# --- the sets of codes --------------------------------------------------------------------------


def test_codes_stand_for_what_ml_dtypes_says() -> None:
    four = np.arange(16, dtype=np.uint8)
    library = four.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    assert np.array_equal(np.ldexp(E2M1.integers(four), -1), library)
    eight = np.arange(256, dtype=np.uint8)
    values = eight.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    integers = E4M3.integers(eight)
    assert [code for code in eight if integers[code] == NOT_A_NUMBER] == [0x7F, 0xFF]
    finite = integers != NOT_A_NUMBER
    assert np.array_equal(np.ldexp(integers[finite].astype(float), -9), values[finite])
    assert (E4M3.low, E4M3.high) == (min(integers), max(integers[finite]))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8])
def test_a_bit_stream_is_one_little_endian_integer(size: int) -> None:
    codes = RNG.integers(0, 1 << size, (3, 29)).astype(np.uint8)
    nbytes = 4 * -(-29 * size // 32)
    packed = pack_bits(codes, size, nbytes)
    for row, stream in zip(codes.tolist(), packed, strict=True):
        whole = int.from_bytes(stream.tobytes(), "little")
        assert whole == sum(code << (size * k) for k, code in enumerate(row))
    assert np.array_equal(unpack_bits(packed, size)[:, :29], codes)
    filled = packed | pack_bits(np.full((3, 8 * nbytes // size), (1 << size) - 1), size, nbytes)
    kept = replace_bits(filled, size, codes)
    assert np.array_equal(unpack_bits(kept, size)[:, :29], codes)
    assert (unpack_bits(kept, size)[:, 29:] == (1 << size) - 1).all()


# --- compressed-tensors -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", [16, 64])
def test_pack_quantized(tmp_path: Path, size: int, zeros: bool, group: int) -> None:
    n = Numbers(11, 64, group, bits=size, zeros=zeros)
    config = grids.ct_config(num_bits=size, group_size=group, symmetric=not zeros)
    place = grids.folder(tmp_path / "m", config, grids.pack_quantized("a", n, zeros=zeros))
    model = open_quantised(place)
    assert np.array_equal(model.matrix("a.weight").values(), n.values() + 0.0)
    before, after = recoded(model, "a.weight")
    assert before.equals(after)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [3, 4, 8])
@pytest.mark.parametrize(
    ("strategy", "symmetric"),
    [("group", True), ("group", False), ("channel", True), ("channel", False)],
)
def test_pack_quantized_as_the_library_packs_and_unpacks(
    tmp_path: Path, dtype: str, size: int, strategy: str, symmetric: bool
) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    group = 32 if strategy == "group" else None
    args = QuantizationArgs(num_bits=size, symmetric=symmetric, strategy=strategy, group_size=group)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    weight = torch.randn(20, 96, generator=torch.Generator().manual_seed(3))
    groups = 96 // (group or 96)
    half = 1 << (size - 1)
    state = {
        "weight": weight.to(getattr(torch, dtype)),
        "weight_scale": (torch.rand(20, groups) / half + 0.01).to(getattr(torch, dtype)),
        "weight_zero_point": torch.randint(-half, half, (20, groups), dtype=torch.int8),
    }
    packed = PackedQuantizationCompressor.compress(state, scheme)
    place = grids.folder(
        tmp_path / "m",
        grids.ct_config(num_bits=size, symmetric=symmetric, strategy=strategy, group_size=group),
        {f"a.{key}": value for key, value in packed.items()},
    )
    model = open_quantised(place)
    found = model.matrix("a.weight").values()
    library = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
    rounded = torch.from_numpy(found).to(library.dtype)
    assert torch.equal(rounded + 0, library + 0)  # one rounding of the exact value
    before, after = recoded(model, "a.weight")
    assert before.equals(after)


def test_actorder_gives_each_column_its_group(tmp_path: Path) -> None:
    n = Numbers(8, 64, 16, zeros=True)
    order = RNG.permutation(np.repeat(np.arange(4), 16)).astype(np.int32)
    tensors = grids.pack_quantized("a", n, zeros=True)
    tensors["a.weight_g_idx"] = order
    config = grids.ct_config(group_size=16, symmetric=False, actorder="group")
    found = open_quantised(grids.folder(tmp_path / "m", config, tensors)).matrix("a.weight")
    for i, j in np.ndindex(8, 64):
        g = order[j]
        wanted = float(n.scales[i, g]) * (int(n.codes[i, j]) - int(n.zeros[i, g]))
        assert found.values()[i, j] == exact(wanted)
    tensors["a.weight_g_idx"] = np.full(64, -1, np.int32)  # the natural order
    found = open_quantised(grids.folder(tmp_path / "n", config, tensors)).matrix("a.weight")
    assert np.array_equal(found.values(), n.values() + 0.0)


def test_the_natural_order_that_writers_store_is_none(tmp_path: Path) -> None:
    """GPTQ's files hold `g_idx` always; ONNX operators and kernels take consecutive columns."""
    n = Numbers(8, 64, 32, zeros=True)
    order = np.repeat(np.arange(2), 32).astype(np.int32)
    config = grids.ct_config(symmetric=False)
    stored = {
        "g_idx": (grids.GPTQ, grids.gptq("a", n)),
        "weight_g_idx": (config, grids.pack_quantized("a", n, zeros=True)),
    }
    for role, (config, tensors) in stored.items():
        for given in (order, order[::-1].copy()):
            tensors[f"a.{role}"] = given
            place = grids.folder(tmp_path / f"{role}{given[0]}", config, tensors)
            matrix = open_quantised(place).matrix("a.weight")
            assert (matrix.order is None) == (given is order)
            if given is order:
                require_exact("a.weight", matrix, "float32")


def nvfp4(rows: int, columns: int, whole: float) -> dict[str, Any]:
    packed = RNG.integers(0, 256, (rows, columns // 2), np.uint8)
    scales = RNG.integers(0, 0x7F, (rows, columns // 16), np.uint8)
    return {
        "a.weight_packed": packed,
        "a.weight_scale": scales.view(ml_dtypes.float8_e4m3fn),
        "a.weight_global_scale": np.array([whole], np.float32),
    }


def test_nvfp4_divides_once_in_float32_as_the_library_does(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    tensors = nvfp4(24, 64, 13297.0)
    model = open_quantised(grids.folder(tmp_path / "m", grids.NVFP4, tensors))
    found = model.matrix("a.weight")
    state = {
        "weight_packed": torch.from_numpy(tensors["a.weight_packed"]),
        "weight_scale": torch.from_numpy(
            tensors["a.weight_scale"].view(np.uint8)
        ).view(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor([13297.0]),
    }  # fmt: skip
    library = NVFP4PackedCompressor.decompress(state, scheme)["weight"]
    assert library.dtype == torch.bfloat16
    assert torch.equal(torch.from_numpy(found.values()).to(torch.bfloat16) + 0, library + 0)
    scales = tensors["a.weight_scale"].astype(np.float32)
    for i, j in np.ndindex(24, 64):
        byte = int(tensors["a.weight_packed"][i, j // 2])
        code = byte >> 4 if j % 2 else byte & 15
        value = float(np.array([code], np.uint8).view(ml_dtypes.float4_e2m1fn)[0])
        step = np.float32(scales[i, j // 16]) / np.float32(13297.0)
        assert found.values()[i, j] == exact(value * float(step))
    before, after = recoded(model, "a.weight")
    assert before.equals(after)


# --- ModelOpt and FP8 ---------------------------------------------------------------------------


def test_modelopt_nvfp4_multiplies_exactly(tmp_path: Path) -> None:
    tensors = nvfp4(8, 32, 1.0)
    whole = np.float32(1 / 13297)
    renamed = {
        "a.weight": tensors["a.weight_packed"],
        "a.weight_scale": tensors["a.weight_scale"],
        "a.weight_scale_2": np.array(whole),
    }
    place = grids.folder(
        tmp_path / "m", {"quantization": {"quant_algo": "NVFP4"}}, renamed, "hf_quant_config.json"
    )
    model = open_quantised(place)
    assert model.method == "modelopt"
    found = model.matrix("a.weight").values()
    scales = tensors["a.weight_scale"].astype(np.float64)
    for i, j in np.ndindex(8, 32):
        byte = int(tensors["a.weight_packed"][i, j // 2])
        code = byte >> 4 if j % 2 else byte & 15
        value = float(np.array([code], np.uint8).view(ml_dtypes.float4_e2m1fn)[0])
        assert found[i, j] == exact(value * (scales[i, j // 16] * float(whole)))
    before, after = recoded(model, "a.weight")
    assert before.equals(after)


def test_modelopt_int4_interleaves_two_rows(tmp_path: Path) -> None:
    codes = RNG.integers(-8, 8, (6, 32))
    scales = RNG.normal(size=(6, 2)).astype(np.float32)
    pairs = zip(codes[::2], codes[1::2], strict=True)
    packed = np.array([(even & 15) | (odd & 15) << 4 for even, odd in pairs], np.uint8)
    config = {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "pre_quant_scale": True}
    tensors = {"a.weight": packed, "a.weight_scale": scales}
    model = open_quantised(grids.folder(tmp_path / "m", config, tensors))
    found = model.matrix("a.weight")
    assert np.array_equal(found.codes, codes)
    assert found.values()[5, 20] == exact(float(scales[5, 1]) * int(codes[5, 20]))
    before, after = recoded(model, "a.weight")
    assert before.equals(after)


def e4m3(rows: int, columns: int) -> npt.NDArray[Any]:
    magnitudes = RNG.integers(0, 0x7F, (rows, columns), np.uint8)
    signs = RNG.integers(0, 2, (rows, columns), np.uint8) << 7
    bytes_ = (magnitudes | signs).astype(np.uint8)
    return np.asarray(bytes_.view(ml_dtypes.float8_e4m3fn))


@pytest.mark.parametrize("shape", [(256, 128), (130, 200)])
def test_fine_grained_fp8(tmp_path: Path, shape: tuple[int, int]) -> None:
    weight = e4m3(*shape)
    scales = RNG.normal(size=(-(-shape[0] // 128), -(-shape[1] // 128))).astype(np.float32)
    tensors = {"a.weight": weight, "a.weight_scale_inv": scales}
    found = open_quantised(grids.folder(tmp_path / "m", grids.FP8, tensors)).matrix("a.weight")
    spread = scales.astype(np.float64).repeat(128, 0).repeat(128, 1)[: shape[0], : shape[1]]
    assert np.array_equal(found.values(), weight.astype(np.float64) * spread + 0.0)
    if shape == (256, 128):
        torch = pytest.importorskip("torch")
        pytest.importorskip("transformers")
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize

        theirs = Fp8Dequantize(None)._dequantize_one(
            torch.from_numpy(weight.view(np.uint8)).view(torch.float8_e4m3fn),
            torch.from_numpy(scales),
            torch.float32,
        )
        assert np.array_equal(found.values().astype(np.float32), theirs.numpy() + 0.0)


@pytest.mark.parametrize("scales", [(), (1,), (12, 1)])
def test_fp8_of_modelopt_and_compressed_tensors(tmp_path: Path, scales: tuple[int, ...]) -> None:
    weight, factor = e4m3(12, 20), RNG.normal(size=scales).astype(np.float32)
    config = {"quant_method": "modelopt", "quant_algo": "FP8"}
    tensors = {"a.weight": weight, "a.weight_scale": np.asarray(factor, np.float32)}
    model = open_quantised(grids.folder(tmp_path / "m", config, tensors))
    wanted = weight.astype(np.float64) * np.asarray(factor, np.float64)
    assert np.array_equal(model.matrix("a.weight").values(), wanted + 0.0)
    before, after = recoded(model, "a.weight")
    assert before.equals(after)


# --- GPTQ and AWQ -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("v1", [True, False])
def test_gptq_zero_points_borrow_across_codes(tmp_path: Path, size: int, v1: bool) -> None:
    n = Numbers(16, 64, 32, bits=size, zeros=True)
    n.zeros[3, 0] = n.zeros[4, 1] = 0  # borrows from the code behind it
    config = {
        **grids.GPTQ,
        "bits": size,
        "checkpoint_format": "gptq" if v1 else "gptq_v2",
    }
    model = open_quantised(grids.folder(tmp_path / "m", config, grids.gptq("a", n, v1=v1)))
    assert np.array_equal(model.matrix("a.weight").values(), n.values() + 0.0)
    before, after = recoded(model, "a.weight")
    assert before.equals(after)


def test_awq_as_the_converter_reads_it(tmp_path: Path) -> None:
    n = Numbers(16, 64, 32, zeros=True)
    tensors = grids.awq("a", n)
    model = open_quantised(grids.folder(tmp_path / "m", grids.AWQ, tensors))
    found = model.matrix("a.weight")
    assert np.array_equal(found.values(), n.values() + 0.0)
    before, after = recoded(model, "a.weight")
    assert before.equals(after)
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter

    converted = AutoAWQConverter(group_size=32).process(
        {key: torch.from_numpy(value) for key, value in tensors.items()}
    )
    config = grids.ct_config(symmetric=False)
    theirs = open_quantised(grids.folder(tmp_path / "n", config, converted)).matrix("a.weight")
    assert np.array_equal(theirs.codes, found.codes)
    assert np.array_equal(theirs.values(), found.values())


# --- GGUF ---------------------------------------------------------------------------------------


def blocks(kind: str, rows: int, columns: int) -> npt.NDArray[np.uint8]:
    """Rows of blocks of random bytes whose float16 steps are finite."""
    block = TYPES[kind]
    data = RNG.integers(0, 256, (rows * columns // block.weights, block.nbytes), np.uint8)
    places = {"Q2_K": [80, 82], "Q3_K": [108], "Q6_K": [208]}
    for begin in places.get(kind, [0, 2] if block.has_minimum else [0]):
        steps = (RNG.normal(size=len(data)) / 50).astype(np.float16)
        data[:, begin : begin + 2] = steps.view(np.uint8).reshape(-1, 2)
    return data.reshape(rows, -1)


@pytest.mark.parametrize("kind", list(TYPES))
def test_gguf_blocks_as_the_gguf_package_reads_them(kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    data = blocks(kind, 3, 512)
    layout = GgufBlocks(shape=(3, 512), type=kind)
    parts = raw({"blocks": data})
    found = layout.unpack(parts)
    theirs = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(found.values().astype(np.float32), theirs + 0.0)
    assert layout.recode(parts, found.codes).equals(parts["blocks"])
    new = RNG.integers(found.kind.low, found.kind.high + 1, (3, 512)).astype(np.int8)
    again = layout.unpack({"blocks": layout.recode(parts, new)})
    assert np.array_equal(again.codes, new)
    assert np.array_equal(again.steps, found.steps)
    if found.minima is not None and again.minima is not None:
        assert np.array_equal(again.minima, found.minima)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_a_gguf_file_that_gguf_wrote(tmp_path: Path, kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    weight = RNG.normal(size=(16, 256)).astype(np.float32)
    weight[0, :32] = 0  # a step of zero
    number = gguf.GGMLQuantizationType[kind]
    data = gguf.quants.quantize(weight, number)
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.ffn_up.weight", data, raw_dtype=number)
    writer.add_tensor("output_norm.weight", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = open_quantised(path)
    assert (list(model.stored), model.plain) == (["blk.0.ffn_up.weight"], ("output_norm.weight",))
    found = model.matrix("blk.0.ffn_up.weight")
    theirs = gguf.quants.dequantize(data, number)
    assert np.array_equal(found.values().astype(np.float32), theirs + 0.0)
    assert found.still == 1
    assert np.array_equal(model.source.raw("output_norm.weight").values(), np.ones(256))


# --- ONNX ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("zeros", [False, True])
def test_matmul_nbits_as_onnx_runtime_runs_it(tmp_path: Path, size: int, zeros: bool) -> None:
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    n = Numbers(8, 40, 16, bits=size, zeros=zeros)  # the last block is partial
    path = grids.matmul_graph(tmp_path / "m.onnx", {"a.weight": n}, zeros=zeros, padding=1)
    model = open_quantised(path)
    found = model.matrix("a.weight")
    assert np.array_equal(found.values(), n.values() + 0.0)
    before, after = recoded(model, "a.weight")
    assert before.equals(after)  # the codes behind K as well
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {"x": np.eye(40, dtype=np.float32)})
    assert np.array_equal(theirs.T + 0.0, found.values().astype(np.float32))


def test_float_zero_points_of_matmul_nbits() -> None:
    n = Numbers(4, 32, 16)
    layout = MatMulNBits(shape=(4, 32), bits=4, group=16)
    arrays = grids.matmul_nbits(n)
    whole = layout.unpack(raw({**arrays, "zero_points": n.zeros.astype(np.float32)}))
    assert np.array_equal(whole.values(), n.values() + 0.0)
    assert whole.minima is None
    halves = layout.unpack(raw({**arrays, "zero_points": (n.zeros + 0.5).astype(np.float32)}))
    scales = n.scales.astype(np.float64).repeat(16, 1)
    assert np.array_equal(halves.values(), scales * (n.codes - 8.5) + 0.0)


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [("INT4", -8, 7), ("UINT4", 0, 15), ("INT8", -128, 127), ("UINT8", 0, 255)],
)
@pytest.mark.parametrize("block", [0, 20, 32])
@pytest.mark.parametrize("zeros", [False, True])
def test_dequantize_linear_as_onnx_runtime_runs_it(
    tmp_path: Path, kind: str, low: int, high: int, block: int, zeros: bool
) -> None:
    ort = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    helper, proto = onnx.helper, onnx.TensorProto
    shape = (64, 7)  # (K, N), of an odd count per row
    codes = RNG.integers(low, high + 1, shape)
    grid = (-(-64 // block), 7) if block else (7,)
    scales = RNG.normal(size=grid).astype(np.float32)
    points = RNG.integers(low, high + 1, grid) if zeros else np.zeros(grid, np.int64)
    number = getattr(proto, kind)
    constants = [
        helper.make_tensor("a.weight_DQ_Q4", number, shape, codes.reshape(-1).tolist()),
        onnx.numpy_helper.from_array(scales, "scales"),
    ]
    if zeros:
        constants.append(helper.make_tensor("points", number, grid, points.reshape(-1).tolist()))
    given = {"axis": 0, "block_size": block} if block else {"axis": 1}
    names = [tensor.name for tensor in constants]
    nodes = [
        helper.make_node("DequantizeLinear", names, ["w"], **given),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    sizes = (("x", 64), ("y", 7))
    values = [helper.make_tensor_value_info(v, proto.FLOAT, ["b", n]) for v, n in sizes]
    outputs = [helper.make_tensor_value_info("w", proto.FLOAT, shape)]
    graph = helper.make_graph(nodes, "g", values[:1], [values[1], *outputs], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "m.onnx")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(tmp_path / "m.onnx", options)
    theirs = session.run(["w"], {"x": np.zeros((1, 64), np.float32)})[0]
    opened = open_quantised(tmp_path / "m.onnx")
    found = opened.matrix("a.weight")
    assert found.shape == (7, 64)
    assert np.array_equal(found.values().astype(np.float32), theirs.T + 0.0)
    spread = scales.repeat(block, 0)[:64] if block else scales[None]
    minus = points.repeat(block, 0)[:64] if block else points[None]
    assert np.array_equal(found.values(), (spread.astype(float) * (codes - minus)).T + 0.0)
    before, after = recoded(opened, "a.weight")
    assert before.equals(after)


def test_dequantize_linear_of_float_codes() -> None:
    weight = e4m3(6, 40)
    scales = RNG.normal(size=(6, 2)).astype(np.float32)
    layout = DequantizeLinear(shape=(6, 40), type="FLOAT8E4M3FN", transposed=False, block=(1, 20))
    parts = raw({"x": weight.view(np.uint8).reshape(-1).view(ml_dtypes.float8_e4m3fn),
                 "x_scale": scales})  # fmt: skip
    wanted = weight.astype(np.float64) * scales.astype(np.float64).repeat(20, 1)
    found = layout.unpack(parts)
    assert np.array_equal(found.values(), wanted + 0.0)
    assert layout.recode(parts, found.codes).equals(parts["x"])


def test_every_layout_has_a_test_here() -> None:
    """The table names each layout once; a new one is added to these tests by hand."""
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS) == 10
