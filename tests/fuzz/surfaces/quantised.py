"""Quantised bases as other tools wrote them: folders, GGUF files and ONNX graphs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from kilodelta.files.plain import is_file
from kilodelta.grid import open_quantised
from tests.fuzz.containers import protobuf_changed, safetensors_changed
from tests.fuzz.harness import Read, Surface
from tests.fuzz.mutations import bytes_changed, json_changed
from tests.support import grids
from tests.support.grids import Numbers

N = Numbers(16, 64, 32, zeros=True)


def _opened(path: Path) -> None:
    """Read every weight and the roots, as `digest` and `merge` do."""
    model = open_quantised(path)
    for name in model.stored:
        model.matrix(name).values()
    model.identity(threads=1)


def _folders(example: Path, trusted: Path) -> Read:
    """One folder per layout; which of them is damaged is drawn."""
    import ml_dtypes

    fp8 = {
        "a.weight": np.zeros((4, 8), ml_dtypes.float8_e4m3fn),
        "a.weight_scale_inv": np.ones((1, 1), np.float32),
    }
    for name, config, tensors in (
        ("ct", grids.ct_config(symmetric=False), grids.pack_quantized("a", N, zeros=True)),
        ("gptq", grids.GPTQ, grids.gptq("a", N)),
        ("awq", grids.AWQ, grids.awq("a", N)),
        ("fp8", grids.FP8, fp8),
    ):
        grids.folder(example / name, config, tensors)
    pristine = {(p.parent.name, p.name): p.read_bytes() for p in example.rglob("*.*")}
    warm: list[bool] = []

    def read(work: Path) -> None:
        for folder in sorted(work.iterdir()):
            if not (warm and _is_pristine(folder, pristine)):
                _opened(folder)
        warm.append(True)

    return read


def _is_pristine(folder: Path, pristine: Mapping[tuple[str, str], bytes]) -> bool:
    wanted = {name: data for (place, name), data in pristine.items() if place == folder.name}
    files = {path.name: path for path in folder.iterdir() if is_file(path)}
    return files.keys() == wanted.keys() and all(
        files[name].read_bytes() == data for name, data in wanted.items()
    )


def _gguf(example: Path, trusted: Path) -> Read:
    import gguf

    weight = np.random.default_rng(0).normal(size=(16, 256)).astype(np.float32)
    number = gguf.GGMLQuantizationType.Q4_0
    writer = gguf.GGUFWriter(example / "m.gguf", "llama")
    writer.add_tensor("blk.0.up.weight", gguf.quants.quantize(weight, number), raw_dtype=number)
    writer.add_tensor("norm.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return lambda work: _opened(work / "m.gguf")


def _graph(example: Path, trusted: Path) -> Read:
    """Both operators whose constants are read: the second graph holds DequantizeLinear."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    grids.matmul_graph(example / "m.onnx", {"a": N, "b": N}, zeros=True)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=1, block_size=32),
            helper.make_node("Gemm", ["x", "d"], ["y"], transB=1),
        ],
        "graph",
        [value("x", TensorProto.FLOAT, [1, 64])],
        [value("y", TensorProto.FLOAT, [1, 16])],
        [
            numpy_helper.from_array(np.zeros((16, 64), np.int8), "w"),
            numpy_helper.from_array(np.ones((16, 2), np.float32), "s"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    onnx.save(model, example / "d.onnx")

    def read(work: Path) -> None:
        _opened(work / "m.onnx")
        _opened(work / "d.onnx")

    return read


SURFACES = (
    Surface(
        name="quantised",
        make=_folders,
        mutate={"*.json": (json_changed,), "*.safetensors": (safetensors_changed,)},
        needs=("ml_dtypes",),
    ),
    Surface(name="gguf", make=_gguf, mutate={"*.gguf": (bytes_changed,)}, needs=("gguf",)),
    Surface(
        name="matmulnbits",
        make=_graph,
        mutate={"*.onnx": (protobuf_changed, protobuf_changed, bytes_changed)},
        needs=("onnx",),
    ),
)
