"""A device folder whose TensorRT-RTX engine is patched: bundle, release, and the device's part."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("transformers")
pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

import numpy as np

from kilodelta.device import bundle, release
from kilodelta.device.folder import DeviceFolder
from kilodelta.device.golden import golden
from kilodelta.device.golden.reference import ROWS, golden_inputs
from kilodelta.device.make import engines
from kilodelta.device.make.engines import EngineRecipe, read_recipe
from kilodelta.device.modes import patch as patch_mode
from kilodelta.device.modes import runtime
from kilodelta.device.serving import Device
from kilodelta.device.update.apply import apply
from kilodelta.errors import DeviceError, ExportError, InputError, OutputError, ProofError
from kilodelta.export.manifest.artefacts import file_fact
from kilodelta.export.onnx.make import export_template
from kilodelta.export.onnx.save import save
from kilodelta.export.onnx.template import fill_template
from kilodelta.export.patching import rewrite
from kilodelta.export.patching.map_file import read_map
from kilodelta.files import safetensors
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.file import load
from kilodelta.format.methods import Lora
from kilodelta.format.targets import Patterns
from kilodelta.grid import open_quantised
from kilodelta.grid.quantise import quantise_folder
from kilodelta.merging.build import Recipe, build, quantise_target
from kilodelta.models import open_model
from tests.support import making, pico
from tests.support.devices import Bench
from tests.support.disks import with_free
from tests.support.processes import GOLDEN

LAYERS = Patterns(include=("encoder.*.weight",), exclude=("*LayerNorm*",))


class Running:
    """A double of TensorRT's runner: its output follows the engine's bytes."""

    def __init__(self, path: Path) -> None:
        self._data = np.frombuffer(path.read_bytes(), np.uint8)

    def run(self, batch: Any) -> dict[str, Any]:
        return {"y": np.array([[self._data.sum(dtype=np.int64) % 10**6]], np.float32)}


@pytest.mark.slow
def test_an_engine_is_bundled_released_and_patched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = pico.bert(tmp_path / "base")
    device = tmp_path / "device"
    made = bundle(base, device, mode="patch", engine=["sm86"], dtype="fp16")
    names = {file.file for file in made.files}
    assert (made.mode, made.runtime) == ("patch", "tensorrt_rtx")
    assert {"model.engine", "model.map.json", "rest.safetensors", "recipe.json"} <= names
    assert "model.onnx" not in names
    tune = making.delta(base, Lora(rank=2), patterns=LAYERS)
    tune.save(tmp_path / "task.kd")
    done = release(base, tmp_path / "task.kd", tmp_path / "t1.kd", version=1, engine=[device])
    digests = {k: v for k, v in load(done.path).manifest.made.items() if k.startswith("engine ")}
    [engine] = [file for file in made.files if file.file == "model.engine"]
    assert list(digests) == [f"engine {engine.sha256}"]

    monkeypatch.setattr(runtime, "open_runner", lambda b, folder: Running(folder / "model.engine"))
    folder = DeviceFolder.open(device)
    mode = patch_mode.PatchMode(folder)
    (tmp_path / "stage").mkdir()
    mode.build(load(done.path, base), tmp_path / "stage")
    assert file_fact(tmp_path / "stage" / "model.engine").sha256 in digests.values()
    assert mode.trial(load(done.path, base)).run({}) != mode.open(None).run({})
    with pytest.raises(ExportError, match="was not released for this device's engine"):
        Device(device).run(golden.read(device / "base" / golden.FILE).inputs, tmp_path / "task.kd")
    forged = dataclasses.replace(
        load(done.path),
        manifest=dataclasses.replace(
            load(done.path).manifest, made={f"engine {engine.sha256}": "sha256:" + "0" * 64}
        ),
    )
    forged.save(tmp_path / "forged.kd")
    with pytest.raises(ProofError, match="the patched engine is"):
        apply(device, tmp_path / "forged.kd")
    assert list((device / "deltas").iterdir()) == []

    recipe = json.loads((device / "base" / "recipe.json").read_text())
    recipe["tensorrt"] = "1.0"
    (device / "base" / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(ExportError, match=r"the engine is of tensorrt_rtx 1\.0"):
        release(base, tmp_path / "task.kd", tmp_path / "t2.kd", version=2, engine=[device])
    assert not (tmp_path / "t2.kd").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "sizes"),
    [
        (pico.vit, {}),
        (pico.resnet, {}),
        (pico.resnet, {"height": (16, 24, 32), "width": (16, 16, 32)}),
        (pico.resnet, {"batch": (2, 2, 2), "width": (8, 16, 24)}),
    ],
)
def test_a_release_builds_images_in_the_sizes_of_the_bundle(
    tmp_path: Path, make: Any, sizes: Any
) -> None:
    """A release traces anew, by the golden inputs and the recipe alone: the same graph results."""
    loaded = open_model(make(tmp_path / "base"))
    batch = golden_inputs(loaded, None, ROWS)
    template = export_template(loaded, batch, dtype="float16", sizes=sizes)
    recipe = EngineRecipe(capabilities=("sm86",), sizes=dict(template.sizes), tensorrt="1.7")
    recipe.write(tmp_path)
    exact = golden.Golden(inputs={n: v.numpy() for n, v in batch.items()}, outputs={})
    golden.write(tmp_path / golden.FILE, exact)
    device: Any = SimpleNamespace(base=tmp_path, bundle=SimpleNamespace(dtype="float16"))
    again = engines._template(device, loaded)
    assert again.profile() == template.profile()
    assert (again.inputs, again.outputs) == (template.inputs, template.outputs)
    files = [
        save(fill_template(one, tmp_path / "base"), tmp_path / f"{number}.onnx")[0].read_bytes()
        for number, one in enumerate((template, again))
    ]
    assert files[0] == files[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "gpu"), [("int4-g32", "sm86"), ("fp8", "sm89"), ("nvfp4", "sm120")]
)
def test_an_engine_of_a_quantised_base_is_bundled_released_and_patched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, gpu: str
) -> None:
    """Its codes are written in place, of a file that was made for these codes in any layout."""
    base, floats = tmp_path / "base", pico.sentence_bert(tmp_path / "floats", width=32, layers=1)
    linear = [f"encoder.layer.0.attention.self.{part}.weight" for part in ("query", "value")]
    linear += ["encoder.layer.0.intermediate.dense.weight", "pooler.dense.weight"]
    # The key equals the query, which alone is tuned, and so does the output, so two stay equal.
    layer = "encoder.layer.0.attention"
    alike = {f"{layer}.self.key.weight": linear[0], f"{layer}.output.dense.weight": linear[0]}
    held = Checkpoint.open(floats)
    tensors = {name: held.raw(alike.get(name, name)) for name in held.names}
    (floats / "model.safetensors").unlink()
    safetensors.write(floats / "model.safetensors", tensors)
    quantised = {*linear, *alike}
    quantise_folder(floats, base, precision, quantised.__contains__)
    device = tmp_path / "device"
    made = bundle(base, device, mode="patch", engine=[gpu])
    assert (made.mode, made.runtime) == ("patch", "tensorrt_rtx")
    places = read_map(device / "base" / "model.map.json")
    assert quantised == places.codes.keys()
    where = {one.codes.file for name in linear[:3] for one in places.codes[name]}
    assert where == {"model.engine"}  # the pooler feeds nothing: its codes lie beside the engine

    random, lora, own = np.random.default_rng(1), Lora(rank=2), {}
    for name in linear:
        rows, columns = open_quantised(base).of(name).shape
        factors = {"A": random.normal(size=(2, columns)), "B": 0.1 * random.normal(size=(rows, 2))}
        own[name] = quantise_target(lora, factors, 8)
    recipe = Recipe(method=lora, patterns=Patterns(include=tuple(own)), bits=8)
    build(base, recipe, own).save(tmp_path / "task.kd")
    done = release(base, tmp_path / "task.kd", tmp_path / "t1.kd", version=1, engine=[device])
    engine = file_fact(device / "base" / "model.engine")
    stated = load(done.path).manifest.made[f"engine {engine.sha256}"]

    monkeypatch.setattr(runtime, "open_runner", lambda b, folder: Running(folder / "model.engine"))
    (tmp_path / "stage").mkdir()
    mode = patch_mode.PatchMode(DeviceFolder.open(device))
    mode.build(load(done.path), tmp_path / "stage")
    patched = tmp_path / "stage" / "model.engine"
    assert file_fact(patched).sha256 == stated != engine.sha256
    assert patched.stat().st_size == engine.nbytes
    with pytest.raises(ExportError, match="was not released for this device's engine"):
        Device(device).run(golden.read(device / "base" / golden.FILE).inputs, tmp_path / "task.kd")
    if precision == "nvfp4":
        beside = bundle(base, tmp_path / "beside", mode="adapter", engine=[gpu])
        assert {"adapter.json", "model.engine"} <= {file.file for file in beside.files}


def test_a_release_asks_for_room_before_it_builds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the work began")

    (tmp_path / "model.engine").write_bytes(bytes(4000))
    device = SimpleNamespace(base=tmp_path)
    places = SimpleNamespace(outline=None)
    monkeypatch.setattr(engines, "DeviceFolder", SimpleNamespace(open=lambda folder: device))
    monkeypatch.setattr(engines, "_require_patched", lambda device, delta: places)
    monkeypatch.setattr(rewrite, "patch", never)
    base, delta = Checkpoint.open(GOLDEN / "base.safetensors"), load(GOLDEN / "nola-8.kd")
    with_free(monkeypatch, 8100)
    with pytest.raises(OutputError, match=r"engine, twice \(8 KB\), the merged weights") as error:
        engines.built_digests([tmp_path], base, delta)
    assert "TMPDIR" in error.value.fix
    with_free(monkeypatch, 10**6)
    with pytest.raises(AssertionError, match="began"):
        engines.built_digests([tmp_path], base, delta)


def test_a_folder_without_a_patched_engine_is_refused(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no engine that is patched: it is in"):
        release(bench.base, bench.files["a"], tmp_path / "r.kd", version=1, engine=[bench.device])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"capabilities": "sm86"}, "capabilities"),
        ({"sizes": {"batch": [1, 2]}}, r"sizes\.batch is not a smallest"),
        ({"tensorrt": 1}, "tensorrt"),
        ({"more": 1}, "more"),
    ],
)
def test_a_recipe_is_read_with_distrust(tmp_path: Path, change: Any, words: str) -> None:
    recipe = EngineRecipe(capabilities=("sm86",), sizes={"batch": (1, 2, 3)}, tensorrt="1.7")
    recipe.write(tmp_path)
    assert read_recipe(tmp_path) == recipe
    table = json.loads((tmp_path / "recipe.json").read_text()) | change
    (tmp_path / "recipe.json").write_text(json.dumps(table))
    with pytest.raises(DeviceError, match=words):
        read_recipe(tmp_path)
