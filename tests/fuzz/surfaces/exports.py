"""What `export` and its sister commands wrote: manifests, maps, adapter layouts, ONNX files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from kilodelta.export.adapter.fit import fit
from kilodelta.export.adapter.layout import AdapterLayout, Exposed, StoredInput, read_layout
from kilodelta.export.manifest import artefacts
from kilodelta.export.manifest.facts import (
    Artefact,
    DeltaFacts,
    EngineFacts,
    ExportManifest,
    FileFact,
    Port,
)
from kilodelta.export.onnx.file import read_onnx
from kilodelta.export.patching.map_file import read_map
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.file import load
from tests.fuzz.containers import protobuf_changed, safetensors_changed
from tests.fuzz.harness import Read, Surface
from tests.fuzz.mutations import bytes_changed, json_changed
from tests.support import making

ROOT = "sha256:" + "ab" * 32


def _manifest(example: Path, trusted: Path) -> Read:
    artefacts.write(_described(example), example)

    def read(work: Path) -> None:
        manifest = artefacts.read(work)
        artefacts.check_files(work, manifest)
        json.dumps(artefacts.to_json(manifest), allow_nan=False)

    return read


def _described(folder: Path) -> ExportManifest:
    def fact(name: str) -> FileFact:
        content = name.encode() * 5
        (folder / name).write_bytes(content)
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        return FileFact(file=name, sha256=digest, nbytes=len(content))

    graph, weights, plan = fact("model.onnx"), fact("model.data"), fact("model.engine")
    ids = Port(name="input_ids", dtype="int64", shape=("batch", "sequence"))
    out = Port(name="logits", dtype="float16", shape=("batch", 3))
    onnx = Artefact(
        kind="onnx",
        dtype="float16",
        files=(graph, weights),
        inputs=(ids,),
        outputs=(out,),
        profile={"input_ids": ((1, 1), (8, 64), (32, 128))},
    )
    engine = EngineFacts(
        flavour="tensorrt_rtx",
        version="1.7.1.116",
        capabilities=("sm86", "sm120"),
        tf32=False,
        refittable=("layer.weight",),
        onnx=graph.sha256,
    )
    return ExportManifest(
        tool="kilodelta",
        libraries={"torch": "2.9"},
        base_name="base",
        base_root=ROOT,
        delta=DeltaFacts(
            file=FileFact(file="task.kd", sha256=ROOT, nbytes=9),
            method={"name": "nola", "rank": 2},
        ),
        result_root=ROOT,
        extras=("head.weight",),
        model=None,
        artefacts=(
            onnx,
            Artefact(
                kind="engine",
                dtype="float16",
                files=(plan,),
                inputs=(ids,),
                outputs=(out,),
                profile=onnx.profile,
                engine=engine,
            ),
        ),
    )


def _map(example: Path, trusted: Path) -> Read:
    from kilodelta.export.patching.make_map import make_map
    from kilodelta.export.patching.map_file import write_map
    from tests.support import onnx_files

    base = making.write(trusted / "base.safetensors", making.model())
    onnx_files.write(trusted / "model.onnx", onnx_files.model(making.model()))
    write_map(make_map(trusted / "model.onnx", base), example / "map.json")
    return lambda work: read_map(work / "map.json")


def _onnx(example: Path, trusted: Path) -> Read:
    from tests.support import onnx_files

    onnx_files.write(example / "model.onnx", _graph())
    onnx_files.write(
        example / "far" / "model.onnx", onnx_files.model(making.model()), external=True
    )

    def read(work: Path) -> None:
        read_onnx(work / "model.onnx")
        read_onnx(work / "far" / "model.onnx")

    return read


def _graph() -> object:
    """A model with initializers in several spellings, a subgraph and a function."""
    from onnx import TensorProto, helper, numpy_helper

    floats = np.arange(6, dtype=np.float32).reshape(2, 3)
    weights = [
        numpy_helper.from_array(floats.astype(kind), f"w.{kind.__name__}")
        for kind in (np.float32, np.float16, np.int64, np.int8, np.bool_)
    ]
    weights.append(helper.make_tensor("typed", TensorProto.FLOAT, [2, 3], floats.ravel()))
    inner = helper.make_graph(
        [helper.make_node("Identity", ["inner"], ["inner:out"])],
        "branch",
        [],
        [helper.make_tensor_value_info("inner:out", TensorProto.FLOAT, [2, 3])],
        [numpy_helper.from_array(floats, "inner")],
    )
    nodes = [helper.make_node("Shape", [weight.name], [f"{weight.name}:s"]) for weight in weights]
    nodes.append(helper.make_node("If", ["w.bool"], ["if"], then_branch=inner, else_branch=inner))
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(floats, "c"))
    graph = helper.make_graph([*nodes, constant], "g", [], [], weights)
    function = helper.make_function(
        "local", "f", [], ["c"], [constant], [helper.make_opsetid("", 18)]
    )
    return helper.make_model(
        graph, functions=[function], opset_imports=[helper.make_opsetid("", 18)], ir_version=10
    )


def _adapter(example: Path, trusted: Path) -> Read:
    base = making.write(trusted / "base.safetensors", making.model())
    making.delta(base, making.METHODS[3]).save(trusted / "task.kd")
    delta = load(trusted / "task.kd", base=base)
    checkpoint = Checkpoint.open(base)
    stored = checkpoint.info("norm.bias")
    AdapterLayout(
        base_name="base",
        base_root=delta.manifest.base.root,
        rank=4,
        slots=0,
        dtype="float32",
        optional=True,
        exposed=tuple(
            Exposed(
                info=checkpoint.info(name),
                use="conv" if len(checkpoint.info(name).shape) > 2 else "turned",
            )
            for name in sorted(delta.targets)
        ),
        stored=(StoredInput(info=stored, is_new=False, is_free=False, is_used=True),),
        defaults={"norm.bias": checkpoint.raw("norm.bias")},
    ).write(example)

    def read(work: Path) -> None:
        fit(load(trusted / "task.kd"), read_layout(work))

    return read


SURFACES = (
    Surface(name="manifest", make=_manifest, mutate={"*.json": (json_changed,)}),
    Surface(name="map", make=_map, mutate={"*.json": (json_changed,)}, needs=("onnx",)),
    Surface(
        name="onnx",
        make=_onnx,
        mutate={"*.onnx": (protobuf_changed,), "*.data": (bytes_changed,)},
        needs=("onnx",),
    ),
    Surface(
        name="adapter-folder",
        make=_adapter,
        mutate={"*.json": (json_changed,), "*.safetensors": (safetensors_changed,)},
    ),
)
