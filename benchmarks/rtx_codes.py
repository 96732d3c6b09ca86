"""Whether a TensorRT-RTX engine keeps the codes of quantised weights: INT4, INT8, FP8, NVFP4.

    nice python benchmarks/rtx_codes.py [--json FILE]
    nice python benchmarks/rtx_codes.py --survey [--only NAME,NAME] [--codes nvfp4]
        [--dtypes float16] [--json FILE]

The first form builds two matrices of random codes behind `DequantizeLinear` and `MatMul` into an
engine, and looks for their packed bytes in it, and for those of their scales where these lie in
blocks: as they are, or transposed.

The survey quantises all linear layers of small models of many architectures, to INT4 in groups of
32, to FP8 and to NVFP4, maps their engines for sm89 or sm120 as `bundle --mode patch --engine`
does, and patches a fine-tune of all weights that have a place: how many have one, and in how many
bytes the patched engine differs from a build of the fine-tune. Each row is a process of its own. No
GPU is needed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe
from rtx_patch import MODELS, example, in_a_process, make_model, minilm, write_results

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SIZE, BLOCK, NVFP4_BLOCK = 256, 64, 16
KINDS = ("int4", "int8", "fp8", "nvfp4")
CAPABILITIES = ("sm86", "sm89", "sm120")
DTYPES = ("float16", "float32")
PRECISIONS = {"int4-g32": "sm89", "fp8": "sm89", "nvfp4": "sm120"}
"""What is surveyed, and the GPU that its engines are built for."""
REAL = "all-MiniLM-L6-v2"
"""Surveyed where it is named in `--only`: the real model, with all its layers."""
SIZES = {
    **{"intermediate_size": 64, "hidden_dim": 64, "ffn_dim": 64, "hidden_sizes": [32, 64]},
    **{"num_hidden_layers": 1, "n_layers": 1, "n_layer": 1},
}
"""In place of what `rtx_patch.py` takes: multiples of the 32 columns that share a scale, and one
layer, for every row is built seven times or more."""
WIDE = {"albert": {"embedding_size": 32}, "convbert": {"hidden_size": 64, "embedding_size": 64}}
"""Sizes of models whose other ones lead to fewer than 32 columns."""


def packed(codes: Any, kind: str) -> bytes:
    """A matrix of codes as ONNX keeps it: of four bits two to a byte, the first one low."""
    if kind not in ("int4", "nvfp4"):
        return bytes(np.ascontiguousarray(codes).tobytes())
    flat = codes.reshape(-1)
    return bytes(((flat[0::2] & 15) | ((flat[1::2] & 15) << 4)).astype(np.uint8).tobytes())


def write_model(path: Path, kind: str, dtype: str) -> list[tuple[Any, Any]]:
    """Write `relu(x W0) W1` with quantised weights, and return their codes and scales."""
    import onnx
    from onnx import TensorProto, helper

    random = np.random.default_rng(0)
    real = TensorProto.FLOAT16 if dtype == "float16" else TensorProto.FLOAT
    types = {
        "int4": TensorProto.INT4,
        "int8": TensorProto.INT8,
        "fp8": TensorProto.FLOAT8E4M3FN,
        "nvfp4": TensorProto.FLOAT4E2M1,
    }
    shapes: dict[str, tuple[int, ...]] = {"int4": (SIZE // BLOCK, SIZE), "int8": (SIZE,), "fp8": ()}
    options = {"int4": {"axis": 0, "block_size": BLOCK}, "int8": {"axis": 1}, "fp8": {}}
    options["nvfp4"] = {"axis": 0, "block_size": NVFP4_BLOCK}
    nodes, held, weights, source = [], [], [], "x"
    for number in range(2):
        lowest, highest = (-8, 8) if kind in ("int4", "nvfp4") else (-127, 127)
        drawn = random.integers(lowest, highest, (SIZE, SIZE)).astype(np.int8)
        if kind == "fp8":
            drawn[(drawn & 127) == 127] = 0  # NaN
        names = f"codes{number}", f"scales{number}", f"weight{number}", f"y{number}"
        if kind == "nvfp4":  # E4M3 numbers from 0.5 to 8, times one float
            scales = random.integers(0x30, 0x50, (SIZE // NVFP4_BLOCK, SIZE)).astype(np.uint8)
            parts = f"eighths{number}", f"factor{number}"
            factor = np.asarray(2.0**-9, dtype)
            held.append(
                helper.make_tensor(parts[0], types["fp8"], scales.shape, scales.tobytes(), raw=True)
            )
            held.append(helper.make_tensor(parts[1], real, (), factor.tobytes(), raw=True))
            nodes.append(helper.make_node("DequantizeLinear", parts, [names[1]]))
        else:
            scales = np.asarray(random.random(shapes[kind]) * 0.01 + 0.01, dtype)
            held.append(
                helper.make_tensor(names[1], real, scales.shape, scales.tobytes(), raw=True)
            )
        held.append(
            helper.make_tensor(names[0], types[kind], (SIZE, SIZE), packed(drawn, kind), raw=True)
        )
        nodes.append(helper.make_node("DequantizeLinear", names[:2], [names[2]], **options[kind]))
        nodes.append(helper.make_node("MatMul", [source, names[2]], [names[3]]))
        if number == 0:
            nodes.append(helper.make_node("Relu", [names[3]], ["between"]))
        source = "between"
        weights.append((drawn, scales))
    ports = [helper.make_tensor_value_info(n, real, ["batch", SIZE]) for n in ("x", "y1")]
    graph = helper.make_graph(nodes, "graph", ports[:1], ports[1:], held)
    opset = [helper.make_opsetid("", 23)]  # the first with FLOAT4E2M1
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=11), path)
    return weights


def measure(kind: str, dtype: str, capability: str) -> dict[str, Any]:
    from kilodelta.errors import KiloDeltaError
    from kilodelta.export.tensorrt.build import build
    from kilodelta.export.tensorrt.flavour import RTX, choose

    row: dict[str, Any] = {"codes": kind, "dtype": dtype, "for": capability}
    with tempfile.TemporaryDirectory() as temporary:
        onnx, engine = Path(temporary) / "model.onnx", Path(temporary) / "model.engine"
        weights = write_model(onnx, kind, dtype)
        try:
            trt = choose(RTX, (capability,), (dtype,))
            shapes = ((1, SIZE), (8, SIZE), (32, SIZE))
            build(trt, onnx, engine, capabilities=(capability,), profile={"x": shapes})
        except KiloDeltaError as error:
            return {**row, "refused": " ".join(error.what.split()).split(": ", 1)[-1][:160]}
        data = engine.read_bytes()
    row["found"] = [where(data, *(packed(m, kind) for m in (one, one.T))) for one, _ in weights]
    if kind in ("int4", "nvfp4"):
        scales = [(one, np.ascontiguousarray(one.T)) for _, one in weights]
        row["scales"] = [where(data, *(own.tobytes() for own in pair)) for pair in scales]
    return row


def where(data: bytes, plain: bytes, turned: bytes) -> str:
    """How an engine holds a matrix."""
    return "as it is" if plain in data else "transposed" if turned in data else "nowhere"


def quantised(kind: str, precision: str, dtype: str, folder: Path) -> Path:
    """Write a small model of an architecture, or the real one, its linear layers quantised.

    Args:
        kind: the architecture.
        precision: one of `PRECISIONS`.
        dtype: what its engine computes in, of which the scales have to be numbers.
        folder: for the models.
    """
    from kilodelta.files import safetensors
    from kilodelta.files.checkpoint import Checkpoint
    from kilodelta.files.tensor import RawTensor
    from kilodelta.grid.quantise import quantise_folder
    from kilodelta.models import open_model
    from kilodelta.models.layers import layer_weights

    if kind == REAL:
        base = minilm()
    else:
        own = {name: SIZES.get(name, value) for name, value in MODELS[kind].items()}
        own |= WIDE.get(kind, {})
        base = make_model(kind, folder / "floats", own)
    loaded = open_model(str(base))
    shapes = loaded.module.state_dict()
    chosen = {
        name
        for name in layer_weights(loaded.module, loaded.names)
        if shapes[loaded.names[name]].dim() == 2
    }
    quantise_folder(base, folder / "float32-scales", precision, chosen.__contains__)
    if dtype == "float32":
        return folder / "float32-scales"
    held = Checkpoint.open(folder / "float32-scales")
    tensors = {name: held.raw(name) for name in held.names}
    for name, tensor in tensors.items():
        if name.endswith("weight_scale") and tensor.dtype == "F32":  # NVFP4's are E4M3 numbers
            scales = tensor.data.view(np.float32).reshape(tensor.shape)
            tensors[name] = RawTensor.of(scales.astype(dtype))
    (folder / "base").mkdir()
    config = (folder / "float32-scales" / "config.json").read_text()
    (folder / "base" / "config.json").write_text(config)
    safetensors.write(folder / "base" / "model.safetensors", tensors)
    return folder / "base"


def tune(base: Path, names: list[str], file: Path) -> Any:
    """Write a fine-tune of these quantised weights, and return it."""
    from kilodelta.format.file import load
    from kilodelta.format.methods import Lora
    from kilodelta.format.targets import Patterns
    from kilodelta.grid.open import open_quantised
    from kilodelta.merging.build import Recipe, build, quantise_target

    random, lora, model = np.random.default_rng(1), Lora(rank=2), open_quantised(base)
    own = {}
    for name in names:
        rows, columns = model.of(name).shape
        factors = {"A": random.normal(size=(2, columns)), "B": random.normal(size=(rows, 2)) * 0.1}
        own[name] = quantise_target(lora, factors, 8)
    recipe = Recipe(method=lora, patterns=Patterns(include=tuple(own), exclude=()), bits=8)
    build(base, recipe, own).save(file)
    return load(file)


def survey_one(kind: str, precision: str, dtype: str) -> dict[str, Any]:
    """Map the engine of one small model, and patch a fine-tune of all weights with a place."""
    from kilodelta.errors import KiloDeltaError
    from kilodelta.export.merge.checkpoint import merge
    from kilodelta.export.onnx.make import export_template
    from kilodelta.export.patching.codes.places import REST
    from kilodelta.export.patching.engine.build import engine_builder
    from kilodelta.export.patching.engine.builds import EngineBuilds
    from kilodelta.export.patching.engine.map import make_engine_map
    from kilodelta.export.patching.make_map import write_rest
    from kilodelta.export.patching.rewrite import patch
    from kilodelta.export.quantised.checks import require_grids
    from kilodelta.export.tensorrt.flavour import RTX, choose
    from kilodelta.files.checkpoint import Checkpoint
    from kilodelta.files.dtypes import named
    from kilodelta.grid.dequantise import float_folder
    from kilodelta.grid.open import open_quantised
    from kilodelta.models import open_model

    row: dict[str, Any] = {"model": kind, "codes": precision, "dtype": dtype}
    gpus = (PRECISIONS[precision],)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = quantised(kind, precision, dtype, folder)
        model, began, builds = open_quantised(base), time.perf_counter(), 0

        def count(event: Any) -> None:
            nonlocal builds
            builds = event.done

        with float_folder(model, beside=folder / "values") as values:
            batch = None if kind == REAL else example(kind)
            template = export_template(open_model(str(values)), batch, dtype=dtype)
            values_held = Checkpoint.open(values)
        trt = choose(RTX, gpus, (dtype,))

        def builder(own: Any) -> Any:
            return engine_builder(trt, template, values_held, capabilities=gpus, quantised=own)

        engine = folder / "model.engine"
        try:
            require_grids(model, (dtype,), gpus)
            places = make_engine_map(
                engine,
                model,
                builder(model),
                dtype=named(dtype).name,
                weights=template.weights,
                unused=template.unused,
                progress=count,
            )
        except KiloDeltaError as error:
            return {**row, "refused": " ".join(error.what.split())[:160]}
        weights = [name for name in model.stored if name in template.weights]
        placed = [name for name in weights if name in places.codes]
        copies = [copy for name in placed for copy in places.codes[name]]
        row |= {
            "weights": len(weights),
            "weights_placed": len(placed),
            "copies": len(copies),
            "transposed": sum(getattr(copy.layout, "transposed", False) for copy in copies),
            "scales_in_the_engine": sum(copy.parts["x_scale"].file != REST for copy in copies),
            "others": len(template.weights) - len(weights),
            "others_placed": len(places.places),
            "builds": builds,
            "seconds": round(time.perf_counter() - began, 1),
            "why_not": sorted({places.refused[name] for name in weights if name not in placed}),
        }
        if placed:
            delta = tune(base, placed, folder / "task.kd")
            rest = write_rest(places, model, folder / "rest.safetensors")
            out = folder / "patched.engine"
            patch(engine, delta, out, places=places, base=rest)
            merge(base, delta, folder / "merged")
            merged, patched = open_quantised(folder / "merged"), out.read_bytes()
            pairs = [(merged.matrix(n).codes, model.matrix(n).codes) for n in placed]
            changed = sum(int((a != b).sum()) for a, b in pairs)
            row["codes_changed"] = round(changed / sum(a.size for a, _ in pairs), 4)
            try:
                (folder / "work").mkdir()
                EngineBuilds(builder(merged), folder / "work").require_build({}, patched, "it")
                row["bytes_that_differ"] = 0
            except KiloDeltaError as error:
                row["bytes_that_differ"] = error.what.splitlines()[0]
            row["engine_bytes"] = len(patched)
    return row


def survey(
    kinds: list[str], precisions: list[str], dtypes: list[str], results: Path | None, until: float
) -> list[dict[str, Any]]:
    """Map each model, grid and precision in a process of its own, which may fail alone.

    Args:
        kinds: architectures.
        precisions: of `PRECISIONS`.
        dtypes: what engines compute in.
        results: a file that is written after each row; rows that it holds are not made again.
        until: by `time.monotonic`, after which no row is begun.
    """
    rows: list[dict[str, Any]] = []
    if results is not None and results.exists():
        rows = json.loads(results.read_text())["rows"]
    done = {(row["model"], row["codes"], row["dtype"]) for row in rows}
    for dtype, precision, kind in itertools.product(dtypes, precisions, kinds):
        if (kind, precision, dtype) in done or time.monotonic() > until:
            continue
        one = ["--one", kind, "--codes", precision, "--dtypes", dtype]
        row = {"model": kind, "codes": precision, "dtype": dtype}
        rows.append(row | in_a_process([sys.executable, __file__, *one]))
        print(json.dumps(rows[-1]), flush=True)
        if results is not None:
            write_results(results, {"for": PRECISIONS, "rows": rows})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--survey", action="store_true")
    parser.add_argument("--only", default=",".join(kind for kind in MODELS if kind != "resnet"))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--one", choices=(*MODELS, REAL))
    parser.add_argument("--codes", default=",".join(PRECISIONS))
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no row after these")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(survey_one(given.one, given.codes, given.dtypes)))
        return
    if given.survey:
        until = time.monotonic() + 60 * given.minutes
        kinds, precisions, dtypes = (
            own.split(",") for own in (given.only, given.codes, given.dtypes)
        )
        survey(kinds, precisions, dtypes, given.json, until)
        return
    rows = [measure(k, d, c) for k in KINDS for d in DTYPES for c in CAPABILITIES]
    for row in rows:
        print(json.dumps(row))
    if given.json:
        given.json.write_text(json.dumps({"machine": describe(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
