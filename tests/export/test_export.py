"""`kilodelta export`: base and delta to artefacts that compute the merged model, all or nothing."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")

import onnx
import torch
from click.testing import CliRunner, Result

import kilodelta
from kilodelta.cli import main
from kilodelta.errors import BaseMismatchError, ExportError, InputError, OutputError
from kilodelta.export.manifest import artefacts
from kilodelta.export.onnx import save
from kilodelta.export.onnx.make import export_template
from kilodelta.export.options import read_sizes
from kilodelta.export.pipeline import Exported, export
from kilodelta.files.tensor import RawTensor
from kilodelta.format.methods import Nola
from kilodelta.format.targets import Patterns
from kilodelta.models import LoadedModel, example, open_model
from tests.support import pico
from tests.support.making import delta

CONV1D = ("*.c_attn.weight", "*.c_proj.weight", "*.c_fc.weight")
MATRICES = Patterns(include=("*.weight",), exclude=(), transposed=CONV1D)
TOLERANCE = 1e-5  # relative L2, what float32 sums in another order may differ by


def head() -> dict[str, RawTensor]:
    """A new classifier, which a bare encoder has no place for."""
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(pico.LABELS, pico.WIDTH)).astype(np.float32)
    return {
        "classifier.bias": RawTensor.copy_of(rng.normal(size=pico.LABELS).astype(np.float32)),
        "classifier.weight": RawTensor.copy_of(weight),
    }


@dataclass(frozen=True, kw_only=True)
class Case:
    """A base, a delta, and what they were exported to."""

    base: Path
    file: Path
    config: Path
    done: Exported

    @property
    def folder(self) -> Path:
        return self.done.path

    def torch(self) -> LoadedModel:
        """The merged model in torch, merged anew."""
        merged = self.file.parent / "merged"
        if not merged.exists():
            kilodelta.merge(self.base, self.file, merged)
        return open_model(self.config, weights=merged)


def make_case(place: Path, name: str, **options: Any) -> Case:
    """A pico model with a change in every matrix; `bert_head` is an encoder that gets a head."""
    is_new_head = name == "bert_head"
    base = (pico.bert if is_new_head else pico.MODELS[name])(place / "base")
    config = pico.bert_classifier(place / "config") if is_new_head else base
    made = delta(
        base, Nola(rank=2, bases=9), patterns=MATRICES, extras=head() if is_new_head else {}
    )
    made.save(place / "task.kd")
    options.setdefault("config", str(config) if is_new_head else None)
    done = export(base, place / "task.kd", place / "out", **options)
    return Case(base=base, file=place / "task.kd", config=config, done=done)


@pytest.fixture(scope="module", params=["bert", "gpt2", "llama", "vit", "resnet", "bert_head"])
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    place = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KILODELTA_CACHE", str(place / "cache"))
        yield make_case(place, request.param)


@dataclass(frozen=True)
class Bert:
    """The command line on a pico encoder and its deltas."""

    place: Path

    @property
    def base(self) -> Path:
        return self.place / "base"

    def __call__(
        self, out: Path, *arguments: str, file: str = "task.kd", base: Path | None = None
    ) -> Result:
        command = ["export", base or self.base, self.place / file, "-o", out, "-q", *arguments]
        return CliRunner().invoke(main, list(map(str, command)))


@pytest.fixture(scope="module")
def bert_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bert")
    base = pico.bert(place / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KILODELTA_CACHE", str(place / "cache"))
        for name, extras in (("task.kd", {}), ("head.kd", head())):
            made = delta(base, Nola(rank=2, bases=9), patterns=MATRICES, extras=extras)
            made.save(place / name)
    return place


TRACED: dict[str, Any] = {}
"""Templates of the pico encoder by precision: one serves every fine-tune."""


@pytest.fixture
def bert(bert_place: Path, monkeypatch: pytest.MonkeyPatch) -> Bert:
    def once(loaded: LoadedModel, batch: object, *, dtype: str, sizes: Any) -> Any:
        if sizes:  # of axes by name, which are looked up in the model
            return export_template(loaded, dtype=dtype, sizes=sizes)
        if dtype not in TRACED:
            TRACED[dtype] = export_template(loaded, dtype=dtype)
        return TRACED[dtype]

    monkeypatch.setattr("kilodelta.export.precision.export_template", once)
    return Bert(bert_place)


def run_onnx(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def batch_for(loaded: LoadedModel, rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """Random tokens or pixels, at another shape than was traced."""
    torch.manual_seed(5)
    shown = example(loaded, rows=rows, tokens=tokens)
    for name in {"input_ids", "pixel_values"} & shown.keys():
        is_image = name == "pixel_values"
        shape = shown[name].shape
        shown[name] = torch.randn(shape) if is_image else torch.randint(0, pico.VOCABULARY, shape)
    return shown


def test_the_onnx_file_computes_the_merged_model_and_not_the_base(case: Case) -> None:
    loaded = case.torch()
    [artefact] = case.done.manifest.artefacts
    batch = batch_for(loaded, 2, 5)
    with torch.no_grad():
        expected = loaded.view()(**batch)
    feeds = {port.name: batch[port.name].numpy() for port in artefact.inputs}
    found = run_onnx(case.folder / artefact.file, feeds)
    for port, array in zip(artefact.outputs, found, strict=True):
        assert relative(array, expected[port.name].numpy()) <= TOLERANCE, port.name
        assert port.dtype == str(array.dtype)
    weights = kilodelta.Checkpoint.open(case.base)
    with torch.no_grad():
        before = open_model(case.config, weights=weights).view()(**batch)
    assert relative(found[0], next(iter(before.values())).numpy()) > 0.01


def test_the_manifest_says_what_lies_there(case: Case) -> None:
    manifest = artefacts.read(case.folder)
    assert artefacts.to_json(manifest) == artefacts.to_json(case.done.manifest)
    assert manifest.base_root == kilodelta.digest(case.base).root
    assert manifest.result_root == kilodelta.inspect(case.file).result
    assert manifest.delta.file == artefacts.file_fact(case.file)
    assert manifest.delta.method == {"name": "nola", "rank": 2, "bases": 9, "basis": "sign"}
    assert set(manifest.extras) == set(kilodelta.load(case.file).extras)
    artefacts.check_files(case.folder, manifest)
    assert {p.name for p in case.folder.iterdir()} == {"manifest.json", "model.fp32.onnx"}


def test_an_engine_is_built_from_every_architecture(case: Case, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from kilodelta.export.tensorrt import build
    from kilodelta.export.tensorrt.flavour import choose

    [artefact] = case.done.manifest.artefacts
    trt = choose("auto", ("sm86", "sm120"), ("float32",))
    size = build.build(
        trt,
        case.folder / artefact.file,
        tmp_path / "model.engine",
        capabilities=("sm86", "sm120"),
        profile=artefact.profile,
    )
    assert size == (tmp_path / "model.engine").stat().st_size > 10_000


@pytest.mark.parametrize(
    "dtypes",
    [
        pytest.param({"fp16": "float16"}, id="fp16"),
        pytest.param(
            {"fp16": "float16", "bf16": "bfloat16"}, id="fp16 and bf16", marks=pytest.mark.slow
        ),
    ],
)
def test_engines_without_onnx_in_precisions(
    dtypes: Mapping[str, str], bert: Bert, tmp_path: Path
) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    profile = ("--profile", "batch=1,2,4", "--profile", "sequence=3,8,16")
    chosen = [word for short in dtypes for word in ("--dtype", short)]
    result = bert(tmp_path / "out", "--tensorrt", "sm80,sm89", *chosen, *profile, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["not_kept"] == [f"model.{short}.onnx" for short in dtypes]
    manifest = artefacts.read(tmp_path / "out")
    artefacts.check_files(tmp_path / "out", manifest)
    assert [a.file for a in manifest.artefacts] == [f"model.{short}.engine" for short in dtypes]
    assert [a.dtype for a in manifest.artefacts] == list(dtypes.values())
    for artefact in manifest.artefacts:
        engine = artefact.engine
        assert engine is not None
        assert (engine.flavour, engine.version) == ("tensorrt_rtx", trt.__version__)
        assert engine.capabilities == ("sm80", "sm89")
        assert not engine.tf32
        assert engine.refittable == ()
        assert artefact.profile["input_ids"] == ((1, 3), (2, 8), (4, 16))


def test_bfloat16_weights_are_rounded_to_nearest(bert: Bert, tmp_path: Path) -> None:
    assert bert(tmp_path / "out", "--dtype", "bf16").exit_code == 0
    held = {i.name: i for i in onnx.load(tmp_path / "out" / "model.bf16.onnx").graph.initializer}
    kilodelta.merge(bert.base, bert.place / "task.kd", tmp_path / "merged")
    state = open_model(tmp_path / "merged").module.state_dict()
    name = "encoder.layer.1.output.dense.weight"
    bits = np.frombuffer(held[name].raw_data, np.uint16)
    expected = state[name].to(torch.bfloat16).view(torch.uint16).numpy().reshape(-1)
    assert np.array_equal(bits, expected)


def test_weights_beside_the_file_above_the_limit_and_on_request(
    bert: Bert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bert(tmp_path / "asked", "--external-data").exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(save, "ONE_FILE", 20_000)
        assert bert(tmp_path / "large").exit_code == 0
    assert bert(tmp_path / "whole").exit_code == 0
    loaded = open_model(bert.base)
    feeds = {n: t.numpy() for n, t in batch_for(loaded, 2, 5).items()}
    whole = run_onnx(tmp_path / "whole" / "model.fp32.onnx", feeds)
    for name in ("asked", "large"):
        [artefact] = artefacts.read(tmp_path / name).artefacts
        assert [f.file for f in artefact.files] == ["model.fp32.onnx", "model.fp32.onnx.data"]
        assert artefact.files[1].nbytes > 10_000
        beside = run_onnx(tmp_path / name / "model.fp32.onnx", feeds)
        assert np.array_equal(whole[0], beside[0])


def test_an_engine_from_external_data(bert: Bert, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    result = bert(tmp_path / "out", "--external-data", "--onnx", "--tensorrt", "sm86")
    assert result.exit_code == 0, result.output
    onnx_file, engine = artefacts.read(tmp_path / "out").artefacts
    assert engine.engine is not None
    assert engine.engine.onnx == onnx_file.files[0].sha256
    assert "tensorrt_rtx sm86 1x1..8x32..32x32" in result.stdout


def test_a_new_head_needs_its_architecture(bert: Bert, tmp_path: Path) -> None:
    result = bert(tmp_path / "out", file="head.kd")
    assert result.exit_code == ExportError.exit_code
    assert "BertModel" in result.stderr
    assert "no place for classifier.bias, classifier.weight" in result.stderr
    assert "--config, the tuned model's folder" in " ".join(result.stderr.split())
    pico.bert_classifier(tmp_path / "other", labels=pico.LABELS + 1)
    result = bert(tmp_path / "out", "--config", str(tmp_path / "other"), file="head.kd")
    assert result.exit_code == ExportError.exit_code
    assert "no place for classifier.bias" in result.stderr
    both = ("--config", "x", "--model", "a:b")
    assert bert(tmp_path / "out", *both).exit_code == InputError.exit_code
    assert list(tmp_path.iterdir()) == [tmp_path / "other"]


def test_any_module_by_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nets.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.lin = torch.nn.Linear(5, 4)\n"
        "    def forward(self, x):\n"
        "        return torch.relu(self.lin(x))\n"
        "def make():\n"
        "    return Net()\n"
    )
    monkeypatch.chdir(tmp_path)
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file({"lin.weight": torch.randn(4, 5), "lin.bias": torch.randn(4)}, "base.safetensors")
    delta(Path("base.safetensors"), Nola(rank=2, bases=9), patterns=MATRICES).save("task.kd")
    np.savez("x.npz", x=np.ones((3, 5), np.float32))
    with pytest.raises(InputError, match=r"holds no config\.json"):
        export("base.safetensors", "task.kd", "out")
    with pytest.raises(InputError, match="does not say what its inputs look like"):
        export("base.safetensors", "task.kd", "out", model="nets:make")
    done = export("base.safetensors", "task.kd", "out", model="nets:make", inputs="x.npz")
    [artefact] = done.manifest.artefacts
    assert done.manifest.model == "nets:make"
    assert artefact.profile == {"x": ((1, 5), (8, 5), (32, 5))}
    kilodelta.merge("base.safetensors", "task.kd", "merged.safetensors")
    loaded = open_model("nets:make", weights="merged.safetensors")
    x = torch.randn(7, 5)
    with torch.no_grad():
        expected = loaded.module(x).numpy()
    assert relative(run_onnx(Path("out") / artefact.file, {"x": x.numpy()})[0], expected) < 1e-6


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_during_a_build_leaves_nothing(bert: Bert, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    sent: list[Any] = []

    def press(event: Any) -> None:
        if event.stage == "engine" and not sent:
            sent.append(event)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        export(
            bert.base,
            bert.place / "task.kd",
            tmp_path / "out",
            tensorrt=["sm86"],
            progress=press,
        )
    assert sent
    assert list(tmp_path.iterdir()) == []


def test_what_lies_in_the_output_is_never_lost(
    bert: Bert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for force in ((), ("--force",)):
        result = bert(out, *force)
        assert result.exit_code == OutputError.exit_code
        assert "is no export of kilodelta" in result.stderr
    (out / "notes.txt").unlink()
    assert bert(out).exit_code == 0  # an empty folder is as good as none
    first = artefacts.read(out)
    assert "--force to replace it" in bert(out).stderr
    (out / "notes.txt").write_text("mine")
    assert "also holds notes.txt" in bert(out, "--force").stderr
    (out / "notes.txt").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(
            "kilodelta.export.precision.save",
            lambda *_, **__: (_ for _ in ()).throw(OSError(28, "x")),
        )
        assert bert(out, "--force").exit_code == OutputError.exit_code
    assert artefacts.to_json(artefacts.read(out)) == artefacts.to_json(first)
    link = tmp_path / "link"
    link.symlink_to(out)
    assert bert(link, "--force", "--dtype", "fp16").exit_code == 0
    assert link.is_symlink()
    link.unlink()
    assert {p.name for p in out.iterdir()} == {"manifest.json", "model.fp16.onnx"}
    assert list(tmp_path.iterdir()) == [out]


def test_wrong_arguments(bert: Bert, tmp_path: Path) -> None:
    def fails(error: type[Exception], text: str, *arguments: str) -> None:
        result = bert(tmp_path / "out", *arguments)
        assert result.exit_code == error.exit_code, result.output  # type: ignore[attr-defined]
        assert text in result.stderr
        assert list(tmp_path.iterdir()) == []

    fails(InputError, "engines were described and none was asked for", "--tf32")
    fails(InputError, "is no profile of an axis", "--profile", "batch=4,2,8")
    fails(InputError, "does not take sequence 33", "--profile", "sequence=1,8,33")
    fails(InputError, "no input has an axis frames", "--profile", "frames=1,2,3")
    fails(OutputError, "cannot be written", "-o", str(tmp_path / "absent" / "out"))
    assert bert(tmp_path / "out", "--dtype", "int8").exit_code == 2


def test_another_base_is_refused(bert: Bert, tmp_path: Path) -> None:
    other = pico.bert(tmp_path / "other", seed=9)
    result = bert(tmp_path / "out", base=other)
    assert result.exit_code == BaseMismatchError.exit_code
    assert list(tmp_path.iterdir()) == [other]


@pytest.mark.parametrize(
    "text",
    [
        "batch",
        "batch=1,2",
        "batch=0,1,2",
        "batch=1,2,x",
        "batch=-1,2,3",
        "batch=3,2,4",
        "b=1,1,2147483648",
    ],
)
def test_profiles_of_another_form(text: str) -> None:
    with pytest.raises(InputError, match="is no profile of an axis"):
        read_sizes([text])
    with pytest.raises(InputError, match="is no profile of an axis"):
        read_sizes(["batch=1,2,3", "batch=1,2,3"])
