"""Whether a TensorRT-RTX engine keeps the codes of quantised weights: INT4, INT8 and FP8.

    nice python benchmarks/rtx_codes.py [--json FILE]

Two matrices of random codes behind `DequantizeLinear` and `MatMul` are built into an engine, and
their packed bytes are looked for in it: as they are, or transposed. No GPU is needed. kilodelta
maps and patches engines of float models only, so nothing of it depends on the answer yet.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SIZE, BLOCK = 256, 64
KINDS = ("int4", "int8", "fp8")
CAPABILITIES = ("sm86", "sm89")
DTYPES = ("float16", "float32")


def packed(codes: Any, kind: str) -> bytes:
    """A matrix of codes as ONNX keeps it: INT4 two to a byte, the first one low."""
    if kind != "int4":
        return bytes(np.ascontiguousarray(codes).tobytes())
    flat = codes.reshape(-1)
    return bytes(((flat[0::2] & 15) | ((flat[1::2] & 15) << 4)).astype(np.uint8).tobytes())


def write_model(path: Path, kind: str, dtype: str) -> list[Any]:
    """Write `relu(x W0) W1` with quantised weights, and return their codes."""
    import onnx
    from onnx import TensorProto, helper

    random = np.random.default_rng(0)
    real = TensorProto.FLOAT16 if dtype == "float16" else TensorProto.FLOAT
    types = {
        "int4": TensorProto.INT4,
        "int8": TensorProto.INT8,
        "fp8": TensorProto.FLOAT8E4M3FN,
    }
    shapes: dict[str, tuple[int, ...]] = {"int4": (SIZE // BLOCK, SIZE), "int8": (SIZE,), "fp8": ()}
    options = {"int4": {"axis": 0, "block_size": BLOCK}, "int8": {"axis": 1}, "fp8": {}}
    nodes, held, codes, source = [], [], [], "x"
    for number in range(2):
        lowest, highest = (-8, 8) if kind == "int4" else (-127, 127)
        drawn = random.integers(lowest, highest, (SIZE, SIZE)).astype(np.int8)
        if kind == "fp8":
            drawn[(drawn & 127) == 127] = 0  # NaN
        scales = np.asarray(random.random(shapes[kind]) * 0.01 + 0.01, dtype)
        names = f"codes{number}", f"scales{number}", f"weight{number}", f"y{number}"
        held.append(
            helper.make_tensor(names[0], types[kind], (SIZE, SIZE), packed(drawn, kind), raw=True)
        )
        held.append(helper.make_tensor(names[1], real, scales.shape, scales.tobytes(), raw=True))
        nodes.append(helper.make_node("DequantizeLinear", names[:2], [names[2]], **options[kind]))
        nodes.append(helper.make_node("MatMul", [source, names[2]], [names[3]]))
        if number == 0:
            nodes.append(helper.make_node("Relu", [names[3]], ["between"]))
        source = "between"
        codes.append(drawn)
    ports = [helper.make_tensor_value_info(n, real, ["batch", SIZE]) for n in ("x", "y1")]
    graph = helper.make_graph(nodes, "graph", ports[:1], ports[1:], held)
    opset = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return codes


def measure(kind: str, dtype: str, capability: str) -> dict[str, Any]:
    from kilodelta.errors import KiloDeltaError
    from kilodelta.export.tensorrt.build import build
    from kilodelta.export.tensorrt.flavour import RTX, choose

    row: dict[str, Any] = {"codes": kind, "dtype": dtype, "for": capability}
    with tempfile.TemporaryDirectory() as temporary:
        onnx, engine = Path(temporary) / "model.onnx", Path(temporary) / "model.engine"
        codes = write_model(onnx, kind, dtype)
        try:
            trt = choose(RTX, (capability,), (dtype,))
            shapes = ((1, SIZE), (8, SIZE), (32, SIZE))
            build(trt, onnx, engine, capabilities=(capability,), profile={"x": shapes})
        except KiloDeltaError as error:
            return {**row, "refused": " ".join(error.what.split()).split(": ", 1)[-1][:160]}
        data = engine.read_bytes()
    found = [
        "as it is"
        if packed(one, kind) in data
        else "transposed"
        if packed(one.T, kind) in data
        else "nowhere"
        for one in codes
    ]
    return {**row, "found": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = [measure(k, d, c) for k in KINDS for d in DTYPES for c in CAPABILITIES]
    for row in rows:
        print(json.dumps(row))
    if given.json:
        given.json.write_text(json.dumps({"machine": describe(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
