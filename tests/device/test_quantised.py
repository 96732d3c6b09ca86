"""Device folders of a quantised base: its codes are patched in place, or left alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("transformers")

import onnx

from kilodelta.device import Device, apply, bundle, release, rollback, status
from kilodelta.device.golden import golden
from kilodelta.errors import (
    BaseMismatchError,
    CheckpointError,
    ExportError,
    FileError,
    InputError,
    ProofError,
    QualityError,
)
from kilodelta.export.merge.checkpoint import merge
from kilodelta.export.onnx import named, trace
from kilodelta.export.patching.make_map import make_map, write_rest
from kilodelta.export.patching.map_file import read_map, write_map
from kilodelta.export.patching.rewrite import patch
from kilodelta.export.pipeline import export
from kilodelta.files import canonical
from kilodelta.format.file import load
from kilodelta.format.methods import Lora
from kilodelta.format.targets import Patterns
from kilodelta.grid import open_quantised
from kilodelta.grid.quantise import quantise_folder
from kilodelta.merging import build
from tests.support import grids, pico
from tests.support.processes import BLOCKED, run
from tests.support.traces import remembered, shared_folder

BATCH = {
    "input_ids": np.array([[2, 5, 6, 7, 3], [2, 9, 3, 0, 0]]),
    "attention_mask": np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
}
FOLDERS = ("matmulnbits", "qdq", "adapter")


def is_linear(name: str) -> bool:
    """Whether a weight has the 32 columns of a block; the second of the MLP has 24."""
    is_square = "dense" in name and "0.output" not in name
    return name.endswith(".weight") and (is_square or ".self." in name)


def save_file(base: Path, file: Path, seed: int, size: float = 0.2) -> Path:
    """A LoRA file of all quantised weights."""
    rng, lora = np.random.default_rng(seed), Lora(rank=2)
    own = {
        name: build.quantise_target(
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
    build.build(base, build.Recipe(method=lora, patterns=patterns, bits=8), own).save(file)
    return file


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantised encoder, whose pooler feeds nothing, two releases, and a folder of each kind."""
    root = tmp_path_factory.mktemp("quantised")
    with pytest.MonkeyPatch.context() as patched:
        # One trace serves all three folders, whose bases differ in nothing but codes.
        shared = shared_folder(tmp_path_factory.getbasetemp())
        patched.setattr(named, "trace", remembered(trace.trace, shared))
        return filled(root)


def filled(root: Path) -> Path:
    floats = pico.sentence_bert(root / "floats", width=32, layers=1)
    quantise_folder(floats, root / "base", "int4-g32", is_linear)
    (root / "texts.txt").write_text("\n".join(pico.TEXTS))
    texts = str(root / "texts.txt")
    for number, name in enumerate("ab", 1):
        file = save_file(root / "base", root / f"{name}.kd", number)
        probe = texts if name == "a" else None
        release(root / "base", file, root / f"{name}{number}.kd", version=number, inputs=probe)
    for name in FOLDERS:
        mode, blocks = ("adapter", "auto") if name == "adapter" else ("patch", name)
        bundle(root / "base", root / name, mode=mode, blocks=blocks, probe=texts)
    return root


@pytest.fixture
def device(root: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    shutil.copytree(root / request.param, tmp_path / "device")
    return tmp_path / "device"


def initializers(path: Path) -> dict[str, bytes]:
    return {t.name: t.SerializeToString() for t in onnx.load(path).graph.initializer}


def served(device: Path) -> Path:
    return device / "deltas" / status(device).state.serving.folder / "model.onnx"


@pytest.mark.parametrize("device", FOLDERS, indirect=True)
def test_a_life_on_a_device(root: Path, device: Path) -> None:
    open_device = Device(device)

    def embedding(delta: Any = None) -> Any:
        return open_device.run(BATCH, delta)["sentence_embedding"]

    base = embedding()
    done = apply(device, root / "a1.kd")
    assert done.seen.errors["sentence_embedding"].relative_l2 < 1e-6
    is_patched = (device / "base" / "model.map.json").exists()
    manifest = load(root / "a1.kd").manifest
    assert done.result == (manifest.result if is_patched else manifest.beside)
    assert done.result_proved is is_patched
    a = embedding()
    apply(device, root / "b2.kd")
    b = embedding()
    np.testing.assert_allclose(embedding(root / "a.kd"), a, atol=2e-6)
    assert min(np.abs(a - b).max(), np.abs(a - base).max()) > 1e-3
    assert np.array_equal(embedding("base"), base)
    rollback(device)
    assert np.array_equal(embedding(), a)
    assert status(device, check=True).state.highest == 2


@pytest.mark.parametrize("device", ["matmulnbits", "qdq"], indirect=True)
def test_a_patched_graph_is_the_export_of_the_merged_base(
    root: Path, device: Path, tmp_path: Path
) -> None:
    apply(device, root / "a1.kd")
    blocks = "qdq" if "DequantizeLinear" in operators(served(device)) else "matmulnbits"
    export(root / "base", root / "a.kd", tmp_path / "out", blocks=blocks)
    exported = tmp_path / "out" / "model.fp32.onnx"
    assert initializers(served(device)) == initializers(exported)
    # Only codes differ from the base's graph, and they take the same bytes.
    before = initializers(device / "base" / "model.onnx")
    changed = {name for name, data in initializers(served(device)).items() if before[name] != data}
    assert changed == {name for name in before if name.endswith("Q4")}
    assert served(device).stat().st_size == (device / "base" / "model.onnx").stat().st_size


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def test_a_device_patches_without_torch_and_onnx(root: Path, tmp_path: Path) -> None:
    base = root / "qdq" / "base"
    out = run(
        f"{BLOCKED}\nfrom kilodelta.export.patching.map_file import read_map\n"
        "from kilodelta.export.patching.rewrite import patch\n"
        f"done = patch({str(base / 'model.onnx')!r}, {str(root / 'a.kd')!r},"
        f" {str(tmp_path / 'a.onnx')!r}, places=read_map({str(base / 'model.map.json')!r}),"
        f" base={str(base / 'rest.safetensors')!r})\n"
        "print(done.targets, done.unused)"
    )
    assert out.split(maxsplit=1) == ["6", "('pooler.dense.weight',)\n"]


def test_both_copies_of_a_weight_get_the_codes(root: Path, tmp_path: Path) -> None:
    """One as MatMulNBits, one as DequantizeLinear that a second output unpacks."""
    name = "encoder.layer.0.attention.self.query.weight"
    first, second = (onnx.load(root / kind / "base" / "model.onnx") for kind in FOLDERS[:2])
    nodes = [n for n in second.graph.node if n.input and n.input[0].startswith(f"{name}_DQ")]
    first.graph.node.extend(nodes)
    first.graph.output.append(onnx.helper.make_tensor_value_info(nodes[0].output[0], 1, [32, 32]))
    wanted = set(nodes[0].input)
    held = {t.name for t in first.graph.initializer}
    first.graph.initializer.extend(t for t in second.graph.initializer if t.name in wanted - held)
    onnx.save(first, tmp_path / "two.onnx")
    places = make_map(tmp_path / "two.onnx", root / "base", unused=("pooler.dense.weight",))
    assert [type(one.layout).__name__ for one in places.codes[name]] == [
        "MatMulNBits", "DequantizeLinear",
    ]  # fmt: skip
    rest = write_rest(places, root / "base", tmp_path / "rest.safetensors")
    patch(tmp_path / "two.onnx", root / "a.kd", tmp_path / "a.onnx", places=places, base=rest)
    merge(root / "base", root / "a.kd", tmp_path / "merged")
    codes = open_quantised(tmp_path / "merged").matrix(name).codes
    graph = onnx.load(tmp_path / "a.onnx").graph
    data = {t.name: t.raw_data for t in graph.initializer}
    flat = codes.view(np.uint8).reshape(-1)
    for label, low in ((f"{name}_Q4", flat + 8), (f"{name}_DQ_Q4", flat & 15)):
        packed = (low[0::2] & 15) | ((low[1::2] & 15) << 4)
        assert data[label] == packed.tobytes()


def test_a_copy_that_is_no_codes_is_not_left_behind(root: Path, tmp_path: Path) -> None:
    """A graph that also holds a weight's values as floats would go on computing with them."""
    name = "encoder.layer.0.attention.self.query.weight"
    graph = onnx.load(root / "qdq" / "base" / "model.onnx")
    values = open_quantised(root / "base").matrix(name).values().astype(np.float32)
    graph.graph.initializer.append(onnx.numpy_helper.from_array(values, "copy"))
    graph.graph.node.append(onnx.helper.make_node("Identity", ["copy"], ["again"]))
    graph.graph.output.append(onnx.helper.make_tensor_value_info("again", 1, [32, 32]))
    onnx.save(graph, tmp_path / "copy.onnx")
    places = make_map(tmp_path / "copy.onnx", root / "base")
    assert name not in places.codes
    assert "copy would stay the base's" in places.refused[name]
    with pytest.raises(ExportError, match="has no place in the ONNX file"):
        patch(tmp_path / "copy.onnx", root / "a.kd", tmp_path / "a.onnx", places=places)


@pytest.mark.parametrize("change", ["digest", "shape", "bits", "begin", "version"])
def test_a_map_that_is_wrong_is_refused(root: Path, tmp_path: Path, change: str) -> None:
    table = json.loads((root / "matmulnbits" / "base" / "model.map.json").read_text())
    name = "encoder.layer.0.attention.self.query.weight"
    weight, copy = table["quantised"]["weights"][name], table["codes"][name][0]
    if change == "digest":
        weight[2] = "sha256:" + "0" * 64
    elif change == "shape":
        weight[:2] = [64, 16]
    elif change == "bits":
        copy["layout"]["bits"] = 9
    elif change == "begin":
        copy["parts"]["B"]["begin"] = 1 << 40
    else:
        table["version"] = 3
    (tmp_path / "map.json").write_text(canonical.dumps(table))
    with pytest.raises(FileError, match="is no map"):
        read_map(tmp_path / "map.json")


@pytest.mark.parametrize("device", ["matmulnbits"], indirect=True)
def test_an_update_below_half_a_step_is_refused_and_nothing_changes(
    root: Path, device: Path, tmp_path: Path
) -> None:
    file = save_file(root / "base", tmp_path / "small.kd", 1, size=1e-3)
    with pytest.raises(QualityError, match="changes 0 of") as caught:
        apply(device, file)
    assert "adapter mode" in caught.value.fix
    assert status(device).state.serving.delta == ""
    assert not list((device / "deltas").iterdir())
    # Beside the codes the same update is exact, and its release has a probe for that way alone.
    shutil.copytree(root / "adapter", tmp_path / "adapter")
    texts = str(root / "texts.txt")
    release(root / "base", file, tmp_path / "small-1.kd", version=1, inputs=texts)
    assert golden.of_delta(load(tmp_path / "small-1.kd")) is None
    assert apply(tmp_path / "adapter", tmp_path / "small-1.kd").seen.errors


@pytest.mark.parametrize("device", ["matmulnbits", "adapter"], indirect=True)
def test_files_for_other_bases_are_refused(root: Path, device: Path, tmp_path: Path) -> None:
    quantise_folder(root / "floats", tmp_path / "fp8", "fp8", is_linear)
    other = save_file(tmp_path / "fp8", tmp_path / "fp8.kd", 1)
    with pytest.raises(BaseMismatchError, match="its grids are int4 1x32; the base's e4m3"):
        apply(device, other)
    delta = load(root / "a.kd")
    floats = replace(delta.manifest, grid=None, beside="")
    replace(delta, manifest=floats).save(tmp_path / "float.kd")
    with pytest.raises(BaseMismatchError, match="file was made for a float one") as caught:
        apply(device, tmp_path / "float.kd")
    assert "kilodelta rebase" in caught.value.fix
    with pytest.raises(BaseMismatchError, match="is a quantised model, and the file was made for"):
        release(root / "base", tmp_path / "float.kd", tmp_path / "out.kd", version=1)


@pytest.mark.parametrize("device", ["adapter", "qdq"], indirect=True)
def test_a_probe_of_the_other_way_would_not_do(root: Path, device: Path, tmp_path: Path) -> None:
    """In the grid and beside it the outputs differ by far more than a probe lets them."""
    delta = load(root / "a1.kd")
    own, other = ("beside.", "") if "adapter" in device_kind(device) else ("", "beside.")
    probes = dict(delta.probes)
    name = "output.sentence_embedding"
    probes[own + name] = delta.probes[other + name]
    replace(delta, probes=probes).save(tmp_path / "mixed.kd")
    with pytest.raises(ProofError, match="output sentence_embedding is off"):
        apply(device, tmp_path / "mixed.kd")


def device_kind(device: Path) -> str:
    return status(device).bundle.mode


def test_a_folder_in_another_layout_takes_the_file(root: Path, device_copy: Path) -> None:
    """The roots over codes and scales decide, not how the base was stored."""
    delta = load(root / "a.kd")
    base = replace(delta.manifest.base, root="sha256:" + "1" * 64, tensors=1, fingerprints=b"")
    other = replace(delta, manifest=replace(delta.manifest, base=base))
    other.save(device_copy / "other.kd")
    for name in ("matmulnbits", "adapter"):
        shutil.copytree(root / name, device_copy / name)
        assert apply(device_copy / name, device_copy / "other.kd").state.serving.delta


@pytest.fixture
def device_copy(tmp_path: Path) -> Path:
    return tmp_path


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"mode": "refit", "engine": ["sm89"]}, "TensorRT refits no codes"),
        ({"mode": "refit"}, "TensorRT refits no codes"),  # not: give --engine
        ({"mode": "patch", "engine": ["sm75"], "dtype": "fp16"}, "no numbers of float16"),
        ({"mode": "patch", "dtype": "fp16"}, "no numbers of float16"),
    ],
)
def test_what_a_folder_cannot_do_is_refused_by_name(
    root: Path, tmp_path: Path, options: dict[str, Any], text: str
) -> None:
    if "engine" in options:
        pytest.importorskip("tensorrt_rtx")
    with pytest.raises((InputError, ExportError), match=text):
        bundle(root / "base", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("columns", "options", "text"),
    [
        (64, {"zeros": True}, r"w\.weight has zero points .*TensorRT takes none"),
        (48, {}, r"w\.weight has 48 columns in blocks of 32, the last one partial"),
    ],
)
@pytest.mark.parametrize("mode", ["patch", "adapter"])
def test_grids_that_no_engine_holds_are_refused_before_anything(
    tmp_path: Path, columns: int, options: dict[str, Any], text: str, mode: str
) -> None:
    pytest.importorskip("tensorrt_rtx")
    config = grids.ct_config(num_bits=4, symmetric=not options)
    numbers = grids.Numbers(8, columns, 32, **options)
    base = grids.folder(tmp_path / "base", config, grids.pack_quantized("w", numbers, **options))
    with pytest.raises(ExportError, match=text) as caught:
        bundle(base, tmp_path / "device", mode=mode, engine=["sm89"])
    assert "quantise to FP8 (symmetric, one scale), export a float16 model" in caught.value.fix
    assert not (tmp_path / "device").exists()


def test_a_base_without_codes_is_refused_before_anything(tmp_path: Path) -> None:
    """Its configuration says that it is quantised, and no tensor is."""
    tensors = {"a.weight": np.zeros((2, 2), np.float32)}
    base = grids.folder(tmp_path / "base", grids.CT, tensors)
    with pytest.raises(CheckpointError, match="no weight is stored quantised"):
        bundle(base, tmp_path / "device", mode="patch")
    assert not (tmp_path / "device").exists()


def test_a_single_file_is_no_base_of_a_folder(root: Path, tmp_path: Path) -> None:
    graph = root / "matmulnbits" / "base" / "model.onnx"
    with pytest.raises(InputError, match=r"model.onnx is one file, and a device folder takes"):
        bundle(graph, tmp_path / "out", mode="patch")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("precision", ["fp8", "int4-g32"])
def test_any_graph_with_the_codes_is_mapped_and_patched(tmp_path: Path, precision: str) -> None:
    """One DequantizeLinear, made by hand: of FP8 codes as well."""
    weight = {"a.weight": np.random.default_rng(4).normal(size=(24, 64)).astype(np.float32)}
    floats = grids.folder(tmp_path / "floats", None, weight)
    quantise_folder(floats, tmp_path / "base", precision, "a.weight".__eq__)
    matrix = open_quantised(tmp_path / "base").matrix("a.weight")
    kind, name = (1, "INT4") if precision != "fp8" else (0, "FLOAT8E4M3FN")
    data = matrix.codes.astype(np.uint8) & 15 if kind else matrix.codes
    data = data.reshape(-1)[::2] | (data.reshape(-1)[1::2] << 4) if kind else data
    number = getattr(onnx.TensorProto, name)
    constants = [
        onnx.helper.make_tensor("w", number, [24, 64], data.tobytes(), raw=True),
        onnx.numpy_helper.from_array(
            matrix.steps.astype(np.float32).reshape((24, 2) if kind else ()), "s"
        ),
    ]
    block = {"axis": 1, "block_size": 32} if kind else {}
    nodes = [onnx.helper.make_node("DequantizeLinear", ["w", "s"], ["d"], **block),
             onnx.helper.make_node("Gemm", ["x", "d"], ["y"], transB=1)]  # fmt: skip
    x, y = (onnx.helper.make_tensor_value_info(v, 1, None) for v in "xy")
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], constants)
    sets = [onnx.helper.make_opsetid("", 21)]
    path = tmp_path / "m.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=sets, ir_version=10), path)
    file = save_file(tmp_path / "base", tmp_path / "a.kd", 5)
    patch(path, file, tmp_path / "a.onnx", places=make_map(path, tmp_path / "base"))
    merge(tmp_path / "base", file, tmp_path / "merged")
    new = open_quantised(tmp_path / "merged").matrix("a.weight").codes
    assert np.array_equal(open_quantised(tmp_path / "a.onnx").matrix("w").codes, new)
    assert not np.array_equal(new, matrix.codes)


def test_a_graph_of_another_base_says_what_it_lacks(root: Path, tmp_path: Path) -> None:
    other = {"a.weight": np.eye(32, dtype=np.float32)}
    floats = grids.folder(tmp_path / "floats", None, other)
    quantise_folder(floats, tmp_path / "base", "int4-g32", "a.weight".__eq__)
    with pytest.raises(InputError, match=r"holds no codes of .*: of a\.weight, no operator of the"):
        make_map(root / "qdq" / "base" / "model.onnx", tmp_path / "base")


@pytest.mark.parametrize("kind", ["matmulnbits", "qdq"])
def test_codes_in_external_data_are_patched(root: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(root / kind, tmp_path / "device")
    model = tmp_path / "device" / "base" / "model.onnx"
    proto = onnx.load(model)
    onnx.save(
        proto, model, save_as_external_data=True, location="model.onnx.data", size_threshold=64
    )
    (model.parent / "model.map.json").unlink()
    places = make_map(model, root / "base", unused=("pooler.dense.weight",))
    assert len(places.files) == 2
    write_map(places, model.parent / "model.map.json")
    device = Device(tmp_path / "device")
    trial = device.run(BATCH, root / "a.kd")["sentence_embedding"]
    apply(tmp_path / "device", root / "a.kd")
    np.testing.assert_array_equal(device.run(BATCH)["sentence_embedding"], trial)
    assert np.abs(trial - device.run(BATCH, "base")["sentence_embedding"]).max() > 1e-3
