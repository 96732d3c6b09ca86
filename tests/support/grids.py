"""Quantised weights for tests, written into each layout by scalar loops that share no code with
`kilodelta.grid`: the layout's own description, one code at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from kilodelta.files import safetensors
from kilodelta.files.tensor import RawTensor

Arrays = dict[str, npt.NDArray[Any]]

CT = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 32,
            },
        }
    },
}
"""A configuration of compressed-tensors: four bits, groups of 32."""
NVFP4 = {
    "quant_method": "compressed-tensors",
    "format": "nvfp4-pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "float", "group_size": 16},
        }
    },
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}


def ct_config(**weights: Any) -> dict[str, Any]:
    """`CT` with other arguments of its weights."""
    config: dict[str, Any] = json.loads(json.dumps(CT))
    config["config_groups"]["group_0"]["weights"].update(weights)
    return config


def folder(
    place: Path, config: Mapping[str, Any] | None, tensors: Mapping[str, Any], name: str = ""
) -> Path:
    """Write a model folder.

    Args:
        place: the new folder.
        config: the quantisation configuration; None for a float model.
        tensors: by name, numpy arrays (ml_dtypes as well).
        name: of another file for the configuration, such as `hf_quant_config.json`.
    """
    place.mkdir(parents=True)
    raw = {key: RawTensor.of(value) for key, value in tensors.items()}
    safetensors.write(place / "model.safetensors", raw)
    table: dict[str, Any] = {"model_type": "bert"}
    if name:
        (place / name).write_text(json.dumps(config))
    elif config is not None:
        table["quantization_config"] = dict(config)
    (place / "config.json").write_text(json.dumps(table))
    return place


class Numbers:
    """Codes 0 to 2^bits - 1 (out, in), float16 scales and zero points (out, groups), drawn."""

    def __init__(
        self, rows: int, columns: int, group: int, *, bits: int = 4, zeros: bool = False,
        seed: int = 1,
    ) -> None:  # fmt: skip
        rng = np.random.default_rng(seed)
        groups = -(-columns // group)
        self.bits, self.group = bits, group
        self.codes = rng.integers(0, 1 << bits, (rows, columns))
        # Scales are of both signs, and some are zero: see docs/quantised.md.
        self.scales = (rng.normal(size=(rows, groups)) / 16).astype(np.float16)
        self.scales[0, 0] = np.float16(-0.0)
        half = 1 << (bits - 1)
        self.zeros = np.full((rows, groups), half)
        if zeros:
            self.zeros = rng.integers(0, 1 << bits, (rows, groups))

    def value(self, i: int, j: int) -> float:
        """One weight, exactly, by scalar arithmetic."""
        g = j // self.group
        return float(self.scales[i, g]) * (int(self.codes[i, j]) - int(self.zeros[i, g]))

    def values(self) -> npt.NDArray[np.float64]:
        """All weights, float64 (out, in)."""
        rows, columns = self.codes.shape
        return np.array([[self.value(i, j) for j in range(columns)] for i in range(rows)])


def words(codes: list[int], bits: int) -> list[int]:
    """Pack codes into 32-bit words as one bit stream, low first: one Python integer, then cut."""
    stream = sum(code << (bits * k) for k, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    return [(stream >> (32 * k)) & 0xFFFFFFFF for k in range(count)]


def _int32(table: list[list[int]]) -> npt.NDArray[np.int32]:
    return np.array(table, np.uint32).view(np.int32)


def pack_quantized(name: str, n: Numbers, *, zeros: bool = False, dtype: str = "float16") -> Arrays:
    """compressed-tensors: rows of codes + 2^(bits-1); zero points along dimension 0."""
    scales = n.scales.astype(np.float32).astype(_dtype(dtype))
    found = {
        f"{name}.weight_packed": _int32([words(row.tolist(), n.bits) for row in n.codes]),
        f"{name}.weight_scale": scales,
        f"{name}.weight_shape": np.array(n.codes.shape, np.int64),
    }
    if zeros:
        columns = [words(column.tolist(), n.bits) for column in n.zeros.T]
        found[f"{name}.weight_zero_point"] = np.ascontiguousarray(_int32(columns).T)
    return found


def _dtype(name: str) -> Any:
    return ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)


def gptq(name: str, n: Numbers, *, v1: bool = True) -> Arrays:
    """GPTQ: words along `in`, zero points along `out`; version 1 subtracts one per code."""
    columns = n.codes.shape[1]
    ones = sum(1 << (n.bits * k) for k in range(32 // n.bits))
    zeros = [words(group.tolist(), n.bits) for group in n.zeros.T]
    if v1:
        zeros = [[(word - ones) & 0xFFFFFFFF for word in line] for line in zeros]
    return {
        f"{name}.qweight": np.ascontiguousarray(
            _int32([words(row.tolist(), n.bits) for row in n.codes]).T
        ),
        f"{name}.qzeros": _int32(zeros),
        f"{name}.scales": np.ascontiguousarray(n.scales.T),
        f"{name}.g_idx": np.array([j // n.group for j in range(columns)], np.int32),
    }


def awq(name: str, n: Numbers) -> Arrays:
    """AWQ: the nibbles of a word hold columns 0 2 4 6 1 3 5 7."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def line(values: list[int]) -> list[int]:
        eights = [values[k : k + 8] for k in range(0, len(values), 8)]
        return [sum(eight[c] << (4 * k) for k, c in enumerate(order)) for eight in eights]

    return {
        f"{name}.qweight": _int32([line(column.tolist()) for column in n.codes.T]),
        f"{name}.qzeros": _int32([line(column.tolist()) for column in n.zeros.T]),
        f"{name}.scales": np.ascontiguousarray(n.scales.T),
    }


def matmul_nbits(n: Numbers, *, zeros: bool = False, padding: int = 0) -> Arrays:
    """The inputs B, scales and zero_points of MatMulNBits; `padding` fills codes behind K."""
    rows, columns = n.codes.shape
    groups = -(-columns // n.group)
    spare = [padding] * (groups * n.group - columns)

    def packed(codes: list[int]) -> bytes:
        stream = sum(code << (n.bits * k) for k, code in enumerate(codes))
        return stream.to_bytes(-(-len(codes) * n.bits // 8), "little")

    data = b"".join(packed(row.tolist() + spare) for row in n.codes)
    found: Arrays = {
        "B": np.frombuffer(data, np.uint8).reshape(rows, groups, -1),
        "scales": n.scales.astype(np.float32),
    }
    if zeros:
        points = b"".join(packed(row.tolist()) for row in n.zeros)
        found["zero_points"] = np.frombuffer(points, np.uint8).reshape(rows, -1)
    return found


def matmul_graph(path: Path, weights: Mapping[str, Numbers], **options: Any) -> Path:
    """Write an ONNX file of one MatMulNBits per weight, each of the same input `x`."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants, outputs = [], [], []
    for name, n in weights.items():
        rows, columns = n.codes.shape
        names = {"B": f"{name}_Q{n.bits}", "scales": f"{name}_scales",
                 "zero_points": f"{name}_zero_points"}  # fmt: skip
        arrays = matmul_nbits(n, **options)
        constants += [numpy_helper.from_array(v, names[role]) for role, v in arrays.items()]
        nodes.append(
            helper.make_node(
                "MatMulNBits",
                ["x", *(names[role] for role in arrays)],
                [f"{name}.y"],
                domain="com.microsoft",
                K=columns, N=rows, bits=n.bits, block_size=n.group, accuracy_level=1,
            )
        )  # fmt: skip
        outputs.append(helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, ["b", rows]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", columns])
    graph = helper.make_graph(nodes, "g", [x], outputs, constants)
    sets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=sets, ir_version=10), path)
    return path
