"""Real TensorRT-RTX engines, patched: byte for byte what a build gives; needs no GPU."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

import tensorrt_rtx as rtx

from kilodelta.export.merge.checkpoint import merge
from kilodelta.export.patching.engine.builds import EngineBuilds
from kilodelta.export.patching.engine.map import make_engine_map
from kilodelta.export.patching.make_map import write_rest
from kilodelta.export.patching.rewrite import patch
from kilodelta.export.tensorrt.build import build
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.dtypes import FLOATS
from kilodelta.format.methods import Lora
from kilodelta.format.targets import Patterns
from tests.support import making

LAYERS = 3
WIDTH = 24
PROFILE = {"x": ((1, WIDTH), (4, WIDTH), (8, WIDTH))}
ELEMENT = {"F32": ("FLOAT", "float32"), "F16": ("FLOAT16", "float16")}


def weights() -> making.Tensors:
    random = np.random.default_rng(5)
    made = {}
    for layer in range(LAYERS):
        for name, shape in ((f"w{layer}", (WIDTH, WIDTH)), (f"b{layer}", (WIDTH,))):
            made[name] = ("F32", shape, random.normal(size=shape).astype(np.float32).tobytes())
    return made


def onnx_file(path: Path, held: Mapping[str, Any], dtype: str) -> Path:
    """Three linear layers with ReLUs, from x (batch, 24) to y."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    kind, numpy = ELEMENT[dtype]
    nodes, last = [], "x"
    for layer in range(LAYERS):
        out = "y" if layer == LAYERS - 1 else f"r{layer}"
        nodes += [
            helper.make_node("MatMul", [last, f"w{layer}"], [f"p{layer}"]),
            helper.make_node("Add", [f"p{layer}", f"b{layer}"], [f"s{layer}"]),
            helper.make_node("Relu", [f"s{layer}"], [out]),
        ]
        last = out
    value, element = helper.make_tensor_value_info, getattr(TensorProto, kind)
    graph = helper.make_graph(
        nodes,
        "graph",
        [value("x", element, ["batch", WIDTH])],
        [value("y", element, None)],
        [numpy_helper.from_array(array.astype(numpy), name) for name, array in held.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


@pytest.mark.parametrize("dtype", ELEMENT)
def test_a_patched_engine_is_a_built_one(dtype: str, tmp_path: Path) -> None:
    base = making.write(tmp_path / "base.safetensors", weights())
    checkpoint = Checkpoint.open(base)

    def built(changed: Mapping[str, Any], out: Path) -> None:
        tensors = {n: changed.get(n) or checkpoint.raw(n) for n in checkpoint.names}
        held = {
            n: FLOATS[t.dtype].widen(t.data).reshape(t.shape).copy() for n, t in tensors.items()
        }
        onnx = onnx_file(out.with_suffix(".onnx"), held, dtype)
        build(rtx, onnx, out, capabilities=("sm86",), profile=PROFILE)

    engine, tuned = tmp_path / "model.engine", tmp_path / "tuned.engine"
    places = make_engine_map(engine, checkpoint, built, dtype=dtype, weights=checkpoint.names)
    matrices = {f"w{layer}" for layer in range(LAYERS)}
    assert matrices <= places.places.keys(), places.refused
    delta = making.delta(base, Lora(rank=2), patterns=Patterns(include=("w*",)))
    rest = write_rest(places, base, tmp_path / "rest.safetensors")
    patch(engine, delta, tuned, places=places, base=rest)
    merge(base, delta, tmp_path / "merged.safetensors")
    merged = Checkpoint.open(tmp_path / "merged.safetensors")
    data = tuned.read_bytes()
    (tmp_path / "work").mkdir()
    builds = EngineBuilds(built, tmp_path / "work")
    builds.require_build({n: merged.raw(n) for n in merged.names}, data, "the fine-tune")
    promised = f"sha256:{hashlib.sha256(data).hexdigest()}"
    again = tmp_path / "again.engine"
    patch(engine, delta, again, places=places, base=rest, promised=promised)
    assert again.read_bytes() == data != engine.read_bytes()
