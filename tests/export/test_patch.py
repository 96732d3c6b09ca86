"""Patch mode: the tuned ONNX file is, byte for byte, an export of the merged model."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")

from kilodelta.errors import (
    BaseMismatchError,
    CheckpointError,
    ExportError,
    FileError,
    InputError,
    OutputError,
    ProofError,
)
from kilodelta.export.merge.checkpoint import merge
from kilodelta.export.patching.make_map import make_map, write_rest
from kilodelta.export.patching.map import PatchMap
from kilodelta.export.patching.map_file import read_map, write_map
from kilodelta.export.patching.rewrite import patch
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.floats import cast
from kilodelta.files.tensor import RawTensor
from kilodelta.format.methods import Lora, Method
from tests.support import making, onnx_files

RENAMED = {"wide.weight": "model.0.w", "tall.weight": "onnx::MatMul_7"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return making.write(tmp_path / "base.safetensors", making.model())


def as_dtype(tensors: making.Tensors, dtype: str) -> dict[str, Any]:
    """Tensors as an exporter casts them."""
    return {
        name: (dtype, shape, cast(np.frombuffer(data, np.uint8), kind, dtype).tobytes())
        if kind != "I64"
        else (kind, shape, data)
        for name, (kind, shape, data) in tensors.items()
    }


def tensors_of(path: Path) -> dict[str, Any]:
    found = Checkpoint.open(path)
    infos = {name: found.info(name) for name in found.names}
    return {n: (i.dtype, i.shape, found.data(n).tobytes()) for n, i in infos.items()}


def merged_tensors(base: Path, delta: Any) -> dict[str, Any]:
    path = base.with_name("merged.safetensors")
    merge(base, delta, path)
    return tensors_of(path)


def in_order(tensors: making.Tensors) -> dict[str, Any]:
    return {name: tensors[name] for name in making.model()}


# a patched file is an export of the merged model


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("method", making.METHODS, ids=making.ids)
def test_every_method_gives_the_file_that_the_exporter_gives(
    base: Path, tmp_path: Path, method: Method, external: bool
) -> None:
    delta = making.delta(base, method)
    layout: dict[str, Any] = {
        "names": RENAMED,
        "transposed": ("tall.weight", "h.0.c_attn.weight"),
    }
    model = onnx_files.write(
        tmp_path / "a" / "m.onnx", onnx_files.model(making.model(), **layout), external=external
    )
    before = {path.name: path.read_bytes() for path in model.parent.iterdir()}
    done = patch(model, delta, tmp_path / "b" / "m.onnx", places=make_map(model, base))
    tuned = onnx_files.model(in_order(merged_tensors(base, delta)), **layout)
    wanted = onnx_files.write(tmp_path / "c" / "m.onnx", tuned, external=external)
    assert [path.name for path in done.files] == ["m.onnx", *(["m.onnx.data"] * external)]
    for path in done.files:
        assert path.read_bytes() == (wanted.parent / path.name).read_bytes(), path.name
    assert {path.name: path.read_bytes() for path in model.parent.iterdir()} == before
    assert (done.result, done.targets, done.unused) == (delta.manifest.result, 5, ())


def test_a_float32_file_of_a_half_base_needs_no_checkpoint(base: Path, tmp_path: Path) -> None:
    delta = making.delta(base, Lora(rank=2))
    model = onnx_files.write(tmp_path / "m.onnx", onnx_files.model(as_dtype(making.model(), "F32")))
    places = make_map(model, base)
    assert write_rest(places, base, tmp_path / "rest.safetensors") is None
    patch(model, delta, tmp_path / "t.onnx", places=places)
    wanted = onnx_files.model(as_dtype(in_order(merged_tensors(base, delta)), "F32"))
    assert (tmp_path / "t.onnx").read_bytes() == wanted.SerializeToString()


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_a_rounded_file_is_made_of_the_exact_weights(
    base: Path, tmp_path: Path, dtype: str
) -> None:
    delta = making.delta(base, Lora(rank=2))
    model = onnx_files.write(tmp_path / "m.onnx", onnx_files.model(as_dtype(making.model(), dtype)))
    places = make_map(model, base)
    with pytest.raises(ExportError, match=r"is not held exactly in the ONNX file\n  conv.weight"):
        patch(model, delta, tmp_path / "t.onnx", places=places)
    rest = write_rest(places, base, tmp_path / "rest.safetensors")
    assert rest is not None
    assert "norm.weight" not in Checkpoint.open(rest)
    patch(model, delta, tmp_path / "t.onnx", places=places, base=rest)
    wanted = onnx_files.model(as_dtype(in_order(merged_tensors(base, delta)), dtype))
    assert (tmp_path / "t.onnx").read_bytes() == wanted.SerializeToString()


def test_a_copied_weight_is_written_everywhere(base: Path, tmp_path: Path) -> None:
    delta = making.delta(base, Lora(rank=2))
    tensors = making.model()
    twice = {**tensors, "copy": onnx_files.turned(*tensors["wide.weight"])}
    model = onnx_files.write(tmp_path / "m.onnx", onnx_files.model(twice))
    patch(model, delta, tmp_path / "t.onnx", places=make_map(model, base))
    wanted = merged_tensors(base, delta)["wide.weight"]
    held = onnx_files.held(tmp_path / "t.onnx")
    assert held["wide.weight"] == wanted[2]
    assert held["copy"] == onnx_files.turned(*wanted)[2]


def test_float_data_are_patched_too(base: Path, tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    delta = making.delta(base, Lora(rank=2))
    made = onnx_files.model(as_dtype(making.model(), "F32"))
    tensor = made.graph.initializer[0]
    typed = helper.make_tensor(
        tensor.name, TensorProto.FLOAT, tensor.dims, np.frombuffer(tensor.raw_data, "<f4")
    )
    tensor.CopyFrom(typed)
    model = onnx_files.write(tmp_path / "m.onnx", made)
    patch(model, delta, tmp_path / "t.onnx", places=make_map(model, base))
    import onnx

    found = onnx.numpy_helper.to_array(onnx.load(str(tmp_path / "t.onnx")).graph.initializer[0])
    assert found.tobytes() == merged_tensors(base, delta)["conv.weight"][2]


# extras


def extra(dtype: str, shape: tuple[int, ...]) -> RawTensor:
    values = np.random.default_rng(5).normal(size=shape).astype(np.float32)
    data = np.frombuffer(making.bits_of(dtype, values), np.uint8)
    return RawTensor(dtype=dtype, shape=shape, data=data)


def test_extras_are_written_in_the_files_precision(base: Path, tmp_path: Path) -> None:
    extras = {"norm.bias": extra("F32", (9,)), "norm.weight": extra("BF16", (9,))}
    delta = making.delta(base, Lora(rank=2), extras=extras)
    model = onnx_files.write(tmp_path / "m.onnx", onnx_files.model(making.model()))
    assert patch(model, delta, tmp_path / "t.onnx", places=make_map(model, base)).extras == 2
    held = onnx_files.held(tmp_path / "t.onnx")
    assert held["norm.bias"] == extras["norm.bias"].data.tobytes()
    assert held["norm.weight"] == cast(extras["norm.weight"].data, "BF16", "F32").tobytes()


def test_a_value_beyond_the_files_precision_is_refused(base: Path, tmp_path: Path) -> None:
    huge = RawTensor(dtype="F32", shape=(9,), data=np.full(9, 1e6, "<f4").view(np.uint8))
    delta = making.delta(base, Lora(rank=2), extras={"norm.bias": huge})
    model = onnx_files.write(tmp_path / "m.onnx", onnx_files.model(as_dtype(making.model(), "F16")))
    with pytest.raises(ExportError, match=r"norm\.bias holds values beyond F16"):
        patch(model, delta, tmp_path / "t.onnx", places=make_map(model, base), base=base)


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("norm.bias", extra("F32", (3, 3)), r"norm.bias: its shape is \(3, 3\), the file's \(9,\)"),
        ("head.weight", extra("F32", (9,)), "head.weight: the base has no tensor of that name"),
        ("count", extra("F32", ()), "count: it is F32, the file's tensor I64"),
        ("norm.bias", RawTensor(dtype="I64", shape=(9,), data=np.zeros(72, np.uint8)), "it is I64"),
    ],
)
def test_extras_without_a_place_are_refused_by_name(
    base: Path, tmp_path: Path, name: str, value: RawTensor, what: str
) -> None:
    delta = making.delta(base, Lora(rank=2), extras={name: value})
    tensors = making.model()
    named = {"count": ("I64", (), np.int64(7).tobytes())}
    model = onnx_files.write(tmp_path / "m.onnx", onnx_files.model({**tensors, **named}))
    with pytest.raises(ExportError, match=what):
        patch(model, delta, tmp_path / "t.onnx", places=make_map(model, base))
    assert not (tmp_path / "t.onnx").exists()


def test_what_the_outputs_do_not_use_is_left_out_when_that_is_known(
    base: Path, tmp_path: Path
) -> None:
    delta = making.delta(base, Lora(rank=2), extras={"norm.bias": extra("F32", (9,))})
    some = {n: t for n, t in making.model().items() if n not in ("norm.bias", "embed.weight")}
    model = onnx_files.write(tmp_path / "m.onnx", onnx_files.model(some))
    with pytest.raises(ExportError, match=r"(?s)embed.weight: no ten.*norm.bias: no ten"):
        patch(model, delta, tmp_path / "t.onnx", places=make_map(model, base))
    places = make_map(model, base, unused=("norm.bias", "embed.weight"))
    with pytest.raises(ExportError, match=r"embed\.weight"):  # the proof needs it
        patch(model, delta, tmp_path / "t.onnx", places=places)
    rest = write_rest(places, base, tmp_path / "rest.safetensors")
    done = patch(model, delta, tmp_path / "t.onnx", places=places, base=rest)
    assert done.unused == ("embed.weight", "norm.bias")
    tuned = merged_tensors(base, delta)
    wanted = onnx_files.model({name: tuned[name] for name in some})
    assert (tmp_path / "t.onnx").read_bytes() == wanted.SerializeToString()


# the map is proved by content


def reason(tmp_path: Path, tensors: making.Tensors, made: Any, name: str) -> str:
    base = making.write(tmp_path / "b.safetensors", tensors)
    found = make_map(onnx_files.write(tmp_path / "m.onnx", made), base)
    assert name not in found.places
    return found.refused[name]


def floats(seed: int, shape: tuple[int, ...] = (3, 4)) -> tuple[str, tuple[int, ...], bytes]:
    return "F32", shape, np.random.default_rng(seed).normal(size=shape).astype("<f4").tobytes()


def test_a_folded_weight_is_refused_though_its_name_is_there(tmp_path: Path) -> None:
    folded = onnx_files.model({"a": floats(0), "conv.weight": floats(2)})
    found = reason(tmp_path, {"a": floats(0), "conv.weight": floats(1)}, folded, "conv.weight")
    assert "of that name holds other values: something was folded into it" in found


def test_a_merged_weight_is_refused(tmp_path: Path) -> None:
    tensors = {"a": floats(0), "b": floats(0), "c": floats(1)}
    one = onnx_files.model({"a": floats(0), "c": floats(1)})
    for name, other in (("a", "b"), ("b", "a")):
        assert f"equal those of {other}" in reason(tmp_path, tensors, one, name)
    both = make_map(
        onnx_files.write(tmp_path / "n.onnx", onnx_files.model(tensors)),
        making.write(tmp_path / "b.safetensors", tensors),
    )
    assert [place.name for place in both.places["a"]] == ["a"]
    assert [place.name for place in both.places["b"]] == ["b"]


def test_a_weight_that_feeds_nothing_is_refused(tmp_path: Path) -> None:
    made = onnx_files.model({"a": floats(0), "b": floats(1)})
    del made.graph.node[1], made.graph.output[1]
    found = reason(tmp_path, {"a": floats(0), "b": floats(1)}, made, "b")
    assert "feeds nothing: the graph uses a fused or folded copy" in found


def test_what_cannot_be_told_is_refused(tmp_path: Path) -> None:
    symmetric = "F32", (2, 2), np.array([1, 2, 2, 3], "<f4").tobytes()
    ones = "F32", (4,), np.ones(4, "<f4").tobytes()
    tensors = {"a": floats(0), "s": symmetric, "ones": ones}
    made = onnx_files.model(tensors, names={"ones": "renamed"})
    assert "equals its transpose" in reason(tmp_path, tensors, made, "s")
    assert "all its values are equal" in reason(tmp_path, tensors, made, "ones")


def test_numbers_written_as_varints_are_refused(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    half = "F16", (2, 2), np.arange(4, dtype="<f2").tobytes()
    made = onnx_files.model({"a": floats(0), "half": half})
    made.graph.initializer[1].CopyFrom(
        helper.make_tensor("half", TensorProto.FLOAT16, [2, 2], np.arange(4, dtype=np.float32))
    )
    found = reason(tmp_path, {"a": floats(0), "half": half}, made, "half")
    assert "not kept in one piece" in found


def test_a_file_of_another_model_has_no_map(base: Path, tmp_path: Path) -> None:
    model = onnx_files.write(tmp_path / "m.onnx", onnx_files.model({"a": floats(0)}))
    with pytest.raises(InputError, match="holds no tensor of"):
        make_map(model, base)


def test_a_map_survives_its_file(base: Path, tmp_path: Path) -> None:
    made = onnx_files.model(making.model(), names=RENAMED, transposed=("tall.weight",))
    model = onnx_files.write(tmp_path / "m.onnx", made, external=True)
    found = make_map(model, base, unused=("count",))
    write_map(found, tmp_path / "map.json")
    assert read_map(tmp_path / "map.json") == found


def edit(path: str, value: Any) -> Callable[[Any], None]:
    """Set an entry of the map's JSON, or remove it (`value` ...)."""

    def change(table: Any) -> None:
        *parents, last = path.split("/")
        for key in parents:
            table = table[int(key) if isinstance(table, list) else key]
        last_key: Any = int(last) if isinstance(table, list) else last
        if value is ...:
            del table[last_key]
        else:
            table[last_key] = value

    return change


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (edit("version", 5), "version is 5"),
        (edit("version", 1), "unknown key 'heads'"),
        (edit("heads", {"h": ["F32"]}), r"heads.h is not \[dtype, shape\]"),
        (edit("heads", {"h": ["F33", [1]]}), "heads.h is 'F33'"),
        (edit("version", True), "version is True"),
        (edit("base", ...), "lacks 'base'"),
        (edit("more", 1), "unknown key 'more'"),
        (edit("base/root", "sha256:" + "0" * 64), "base.root is sha256:0"),
        (edit("base/tensors/count", ["F32", [], 5]), "base.tensors.count is not sha256"),
        (edit("base/tensors/count", ["F33", [], 5]), "is 'F33'"),
        (edit("base/tensors/count", ["F32"]), r"is not \[dtype, shape, digest\]"),
        (edit("files/0/file", "../m.onnx"), "leaves the folder"),
        (edit("files/0/nbytes", 10), "ends beyond m.onnx"),
        (edit("places/norm.bias/0/begin", 1 << 40), "places.norm.bias ends beyond m.onnx"),
        (edit("places/norm.bias/0/begin", -1), "not a whole number"),
        (edit("places/norm.bias/0/file", "x"), "places.norm.bias ends beyond x"),
        (edit("places/norm.bias/0/shape", [8]), "places.norm.bias does not fit"),
        (edit("places/norm.bias/0/transposed", True), "does not fit the base"),
        (edit("places/norm.bias/0/dtype", "I32"), "places.norm.bias does not fit"),
        (edit("places/norm.bias", []), "places names 'norm.bias'"),
        (edit("places/nobody", []), "places names 'nobody'"),
    ],
)
def test_a_wrong_map_is_refused_by_field(
    base: Path, tmp_path: Path, change: Callable[[Any], None], what: str
) -> None:
    model = onnx_files.write(tmp_path / "m.onnx", onnx_files.model(making.model()))
    write_map(make_map(model, base), tmp_path / "map.json")
    table = json.loads((tmp_path / "map.json").read_text())
    change(table)
    (tmp_path / "map.json").write_text(json.dumps(table))
    with pytest.raises(FileError, match=what):
        read_map(tmp_path / "map.json")


def test_no_map_and_no_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot be read"):
        read_map(tmp_path / "map.json")
    (tmp_path / "map.json").write_text("{")
    with pytest.raises(FileError, match="is no map"):
        read_map(tmp_path / "map.json")


# nothing wrong gets a name


@pytest.fixture
def ready(base: Path, tmp_path: Path) -> tuple[Path, Any, PatchMap]:
    model = onnx_files.write(tmp_path / "m.onnx", onnx_files.model(making.model()))
    return model, making.delta(base, Lora(rank=2)), make_map(model, base)


def listing(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_model_gets_its_name_after_its_data(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = onnx_files.model(making.model())
    model = onnx_files.write(tmp_path / "a" / "m.onnx", made, external=True)
    named: list[str] = []
    replace = os.replace

    def record(source: Path, target: Path) -> None:
        named.append(target.name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", record)
    delta = making.delta(base, Lora(rank=2))
    named.clear()
    patch(model, delta, tmp_path / "b" / "m.onnx", places=make_map(model, base))
    assert named[-2:] == ["m.onnx.data", "m.onnx"]


def test_another_base_is_refused(ready: Any, tmp_path: Path) -> None:
    model, _, places = ready
    other = making.write(tmp_path / "other.safetensors", making.model(seed=1))
    with pytest.raises(BaseMismatchError, match="holds another base"):
        patch(model, making.delta(other, Lora(rank=2)), tmp_path / "t.onnx", places=places)


def test_a_changed_file_is_refused(ready: Any, tmp_path: Path) -> None:
    model, delta, places = ready
    data = bytearray(model.read_bytes())
    data[-1] ^= 1  # far from the weights: the graph's outputs
    model.write_bytes(data)
    before = listing(tmp_path)
    with pytest.raises(CheckpointError, match="its map was made for sha256:"):
        patch(model, delta, tmp_path / "t.onnx", places=places)
    model.write_bytes(data[:-100])
    with pytest.raises(CheckpointError):
        patch(model, delta, tmp_path / "t.onnx", places=places)
    assert listing(tmp_path) == before


def test_a_wrong_result_is_refused(ready: Any, tmp_path: Path) -> None:
    model, delta, places = ready
    manifest = dataclasses.replace(delta.manifest, result="sha256:" + "0" * 64)
    before = listing(tmp_path)
    with pytest.raises(ProofError, match="the file says sha256:000"):
        patch(model, dataclasses.replace(delta, manifest=manifest), tmp_path / "t", places=places)
    assert listing(tmp_path) == before


def test_places_that_cannot_be_written_are_refused(base: Path, ready: Any, tmp_path: Path) -> None:
    model, delta, places = ready
    with pytest.raises(OutputError, match="exists already"):
        patch(model, delta, model, places=places)
    with pytest.raises(CheckpointError, match="cannot be read"):
        patch(tmp_path / "none.onnx", delta, tmp_path / "t.onnx", places=places)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        patch(model, delta, tmp_path / "file" / "t.onnx", places=places)
    split = onnx_files.write(tmp_path / "x.onnx", onnx_files.model(making.model()), external=True)
    with pytest.raises(InputError, match=r"keeps weights in x.onnx.data"):
        patch(split, delta, tmp_path / "t.onnx", places=make_map(split, base))


def test_a_wrong_rest_of_the_base_is_refused(base: Path, tmp_path: Path) -> None:
    made = onnx_files.model(as_dtype(making.model(), "F16"))
    model = onnx_files.write(tmp_path / "m.onnx", made)
    places, delta = make_map(model, base), making.delta(base, Lora(rank=2))
    other = making.write(tmp_path / "other.safetensors", making.model(seed=1))
    with pytest.raises(ProofError):
        patch(model, delta, tmp_path / "t.onnx", places=places, base=other)
    short = {**making.model(), "conv.weight": floats(0)}
    making.write(other, short)
    with pytest.raises(CheckpointError, match=r"conv\.weight has 48 bytes, but F32 .* takes 384"):
        patch(model, delta, tmp_path / "t.onnx", places=places, base=other)
    assert not (tmp_path / "t.onnx").exists()


def test_copying_through_memory_gives_the_same_file(
    ready: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> int:
        raise OSError("two file systems")

    model, delta, places = ready
    patch(model, delta, tmp_path / "a.onnx", places=places)
    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    patch(model, delta, tmp_path / "b.onnx", places=places)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_a_renamed_model_is_still_itself(ready: Any, tmp_path: Path) -> None:
    model, delta, places = ready
    renamed = model.rename(tmp_path / "renamed.onnx")
    assert patch(renamed, delta, tmp_path / "t.onnx", places=places).targets == 5


BLOCKED = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {'torch', 'onnx', 'onnx_ir', 'onnxscript', 'onnxruntime'}:
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Refuse())
"""


def test_a_device_without_torch_and_onnx_makes_the_map_and_patches(
    base: Path, ready: Any, tmp_path: Path
) -> None:
    model, delta, _ = ready
    delta.save(tmp_path / "task.kd")
    code = (
        f"{BLOCKED}\nfrom kilodelta.export.patching.rewrite import patch\n"
        "from kilodelta.export.patching.make_map import make_map\n"
        f"places = make_map({str(model)!r}, {str(base)!r})\n"
        f"done = patch({str(model)!r}, {str(tmp_path / 'task.kd')!r}, "
        f"{str(tmp_path / 't.onnx')!r}, places=places)\nprint(done.result)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == delta.manifest.result, done.stderr
