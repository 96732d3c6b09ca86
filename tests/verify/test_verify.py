"""`kilodelta verify` on the command line: what is right passes, each wrong is told apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")

import kilodelta
from kilodelta import memory
from kilodelta.cli import main
from kilodelta.errors import FileError, InputError, OutputError, ProofError
from kilodelta.export.manifest import artefacts
from kilodelta.export.pipeline import export
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.tensor import RawTensor
from kilodelta.format.methods import Nola
from kilodelta.format.targets import Patterns
from kilodelta.models.weights import tensor
from kilodelta.verify.parity import bench, plan
from kilodelta.verify.runners import blockwise
from tests.support import pico
from tests.support.making import delta

onnx = pytest.importorskip("onnx")

CONV1D = ("*.c_attn.weight", "*.c_proj.weight", "*.c_fc.weight")
MATRICES = Patterns(include=("*.weight",), exclude=(), transposed=CONV1D)
SIZES = {"batch": (1, 2, 3), "sequence": (1, 4, 9)}
MODEL = "model.fp32.onnx"


def profile(sizes: Mapping[str, tuple[int, int, int]]) -> list[str]:
    """Sizes as `--profile` takes them."""
    return [f"{name}={','.join(map(str, values))}" for name, values in sizes.items()]


NOWHERE = "sm99"  # a GPU that nobody has, so that an engine for it runs nowhere

Edit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class World:
    """A classifier, its delta, an export of it, and texts."""

    place: Path

    @property
    def out(self) -> Path:
        return self.place / "out"

    def verify(self, *arguments: str | Path, file: str = "task.kd", base: str = "base") -> Result:
        words = ["verify", self.place / base, self.place / file, *arguments, "-q"]
        return CliRunner().invoke(main, [str(word) for word in words])

    def run(self, *arguments: str | Path, base: str = "base") -> Result:
        """Verify with the texts as inputs."""
        return self.verify(*arguments, "--inputs", self.place / "texts.txt", base=base)

    def copied(self, to: Path) -> Path:
        return Path(shutil.copytree(self.out, to / "out"))


def make(place: Path, name: str, extras: dict[str, RawTensor] | None = None) -> World:
    base = pico.MODELS[name](place / "base")
    delta(base, Nola(rank=2, bases=9), patterns=MATRICES, extras=extras).save(place / "task.kd")
    texts = [*pico.TEXTS, *reversed(pico.TEXTS)]
    (place / "texts.txt").write_text("".join(f"{text}\n" for text in texts))
    return World(place=place)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    place = tmp_path_factory.mktemp("verify")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KILODELTA_CACHE", str(place / "cache"))
        made = make(place, "bert_classifier")
        export(place / "base", place / "task.kd", made.out, profile=profile(SIZES))
        kilodelta.merge(place / "base", place / "task.kd", place / "merged")
        yield made


def edited(folder: Path, edit: Edit) -> Path:
    """Change the manifest's JSON."""
    place = folder / artefacts.MANIFEST
    table = json.loads(place.read_text())
    edit(table)
    place.write_text(json.dumps(table))
    return folder


def honest(folder: Path) -> Path:
    """Let the manifest tell the digest of the ONNX file that lies there now."""
    fact = artefacts.file_fact(folder / MODEL)

    def edit(table: dict[str, Any]) -> None:
        table["artefacts"][0]["files"] = [
            {"file": fact.file, "sha256": fact.sha256, "nbytes": fact.nbytes}
        ]

    return edited(folder, edit)


def with_engine(folder: Path, source: str | None = None) -> Path:
    """Add an engine for a GPU that nobody has, built from the ONNX file or from `source`."""
    (folder / "model.fp32.engine").write_bytes(b"no engine")
    fact = artefacts.file_fact(folder / "model.fp32.engine")

    def edit(table: dict[str, Any]) -> None:
        onnx_artefact = table["artefacts"][0]
        engine = {
            "flavour": "tensorrt_rtx",
            "version": "1.0",
            "capabilities": [NOWHERE],
            "tf32": False,
            "refittable": [],
            "onnx": source or onnx_artefact["files"][0]["sha256"],
        }
        files = [{"file": fact.file, "sha256": fact.sha256, "nbytes": fact.nbytes}]
        table["artefacts"].append(
            {**onnx_artefact, "kind": "engine", "files": files, "engine": engine}
        )

    return edited(folder, edit)


def test_a_right_export_passes_and_says_so_in_json(world: World, tmp_path: Path) -> None:
    tuned = pico.tuned(world.place / "base", tmp_path / "tuned")
    result = world.run(
        world.place / "merged", world.out, "--against", tuned, "--require", "torch,ort",
        "--report", tmp_path / "report.json", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert json.loads((tmp_path / "report.json").read_text()) == found
    assert found["passed"] is True
    assert found["inputs"] == {"from": str(world.place / "texts.txt"), "rows": 10}
    assert found["merged"].startswith("sha256:")
    assert [file["file"] for file in found["files"]] == [MODEL]
    passed = {(r["artefact"], r["runner"]) for r in found["results"] if r["status"] == "passed"}
    assert passed >= {("merged model", "torch-cpu"), (MODEL, "onnxruntime-cpu")}
    file = next(r for r in found["results"] if r["runner"] == "onnxruntime-cpu")
    assert [check["shape"] for check in file["checks"]] == [[1, 1], [2, 4], [3, 9]]
    assert all(check["error"]["relative_l2"] <= 1e-5 for check in file["checks"])
    assert file["update"]["logits"] == pytest.approx(1.0, abs=1e-3)
    [agreement] = found["agreement"]
    assert agreement["rows"] == 10
    assert 0.0 <= agreement["merged"]["top1"] <= 1.0
    assert agreement["merged"]["kl"] > 0.0


def test_the_table_fits_a_terminal(world: World, tmp_path: Path) -> None:
    result = world.run(with_engine(world.copied(tmp_path)))
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("artefact"))
    rows = [line.split() for line in lines[start + 1 : lines.index("", start)]]
    assert [MODEL, "onnxruntime-cpu", "float32"] in [row[:3] for row in rows]
    assert all(row[-1] == "passed" for row in rows)
    assert max(len(line.rstrip()) for line in lines[start : lines.index("", start)]) <= 100
    assert "export proved  2 files, by digest" in result.stdout
    assert "tensorrt-rtx" in result.stdout
    assert "not run" in result.stdout


def flip(folder: Path) -> None:
    data = bytearray((folder / MODEL).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / MODEL).write_bytes(data)


def other(key: str, field: str) -> Edit:
    def edit(table: dict[str, Any]) -> None:
        table[key][field] = "sha256:" + "0" * 64

    return edit


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "tampered": (flip, f"out: {MODEL} is sha256:"),
    "gone": (
        lambda folder: (folder / MODEL).unlink(),
        f"out: {MODEL} cannot be read: No such file",
    ),
    "base": (lambda folder: edited(folder, other("base", "root")), "from another base"),
    "delta": (lambda folder: edited(folder, other("delta", "sha256")), "from another delta"),
    "result": (lambda folder: edited(folder, other("result", "root")), "from another result"),
    "engine": (
        lambda folder: with_engine(folder, "sha256:" + "1" * 64),
        "model.fp32.engine was built from the ONNX file sha256:1111",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_digests_can_tell(world: World, tmp_path: Path, kind: str) -> None:
    folder = world.copied(tmp_path)
    spoil, text = WRONG[kind]
    spoil(folder)
    result = world.verify(folder, "--digests-only")
    assert result.exit_code == ProofError.exit_code, result.output
    assert text in result.stderr
    assert sum(other in result.stderr for _, other in WRONG.values()) == 1


def test_an_export_of_another_delta(world: World, tmp_path: Path) -> None:
    seeded = delta(world.place / "base", Nola(rank=2, bases=9), patterns=MATRICES, seed=7)
    seeded.save(world.place / "other.kd")
    result = world.verify(world.out, "--digests-only", file="other.kd")
    assert result.exit_code == ProofError.exit_code
    assert "was exported from another delta" in result.stderr


def test_a_damaged_manifest(world: World, tmp_path: Path) -> None:
    folder = edited(world.copied(tmp_path), lambda table: table.pop("result"))
    result = world.verify(folder, "--digests-only")
    assert result.exit_code == FileError.exit_code
    assert "lacks 'result'" in result.stderr


def test_the_base_in_the_artefacts_place(world: World, tmp_path: Path) -> None:
    """Its digests are right, so only running it tells."""
    folder = world.copied(tmp_path)
    model, base = onnx.load(folder / MODEL), Checkpoint.open(world.place / "base")
    for held in model.graph.initializer:
        if held.name in base:
            values = tensor(base, held.name).numpy()
            held.CopyFrom(onnx.numpy_helper.from_array(values, held.name))
    onnx.save(model, folder / MODEL)
    result = world.run(honest(folder), "--json")
    assert result.exit_code == ProofError.exit_code
    found = json.loads(result.stdout)
    assert found["passed"] is False
    assert "these are the base's outputs" in found["error"]
    assert found["fix"]


def test_one_wrong_weight_is_named_as_in_the_checkpoint(world: World, tmp_path: Path) -> None:
    folder = world.copied(tmp_path)
    model = onnx.load(folder / MODEL)
    name = "bert.encoder.layer.1.output.dense.weight"
    held = next(t for t in model.graph.initializer if t.name == name)
    weight = onnx.numpy_helper.to_array(held).copy()
    weight[3, 5] += 0.5
    held.CopyFrom(onnx.numpy_helper.from_array(weight, name))
    onnx.save(model, folder / MODEL)
    result = world.run(honest(folder))
    assert result.exit_code == ProofError.exit_code
    assert "first off at bert.encoder.layer.1.output.dense (node" in result.stderr
    assert "are the base's outputs" not in result.stderr


def test_what_is_required(world: World, tmp_path: Path) -> None:
    folder = with_engine(world.copied(tmp_path))
    result = world.run(folder, "--require", "ort,tensorrt")
    assert result.exit_code == ProofError.exit_code
    assert "tensorrt is required and did not run: " in result.stderr
    result = world.run(world.out, "--require", "tensorrt")
    assert "there is nothing for it to run" in result.stderr
    result = world.run(world.out, "--require", "ort,magic")
    assert result.exit_code == InputError.exit_code
    assert "'magic' is no runner to require" in result.stderr
    assert "known are torch, torch-cpu, torch-cuda, ort, ort-cpu" in result.stderr


def test_a_report_that_cannot_be_written_costs_no_work(world: World, tmp_path: Path) -> None:
    result = world.run(world.out, "--report", tmp_path / "absent" / "r.json", base="absent")
    assert result.exit_code == OutputError.exit_code
    assert "lies in no folder" in result.stderr


def test_without_inputs(world: World) -> None:
    result = world.verify(world.out)
    assert result.exit_code == InputError.exit_code
    assert "noise would prove little" in result.stderr
    result = world.verify(world.out, "--digests-only")
    assert result.exit_code == 0
    assert "outputs        not compared" in result.stdout
    for options in (("--against", "x"), ("--require", "ort"), ("--labels", "x")):
        result = world.verify(*options)
        assert result.exit_code == InputError.exit_code
        assert "outputs are compared on inputs" in result.stderr


def test_places_and_inputs_that_make_no_sense(world: World, tmp_path: Path) -> None:
    result = world.verify(world.place / "merged", world.place / "base")
    assert result.exit_code == InputError.exit_code
    assert "two of a kind: each counts as a merged model" in result.stderr
    for places in ((tmp_path / "none",), (world.place / "merged", tmp_path / "none")):
        result = world.verify(*places)
        assert result.exit_code == InputError.exit_code
        assert "none does not exist" in " ".join(result.stderr.split())
    for inputs, why in (("no.txt", "no.txt is no file"), ("texts", "texts is no kind of input")):
        result = world.verify(world.out, "--inputs", inputs, base="nowhere")
        assert result.exit_code == InputError.exit_code
        assert why in result.stderr
    np.savez(tmp_path / "ids.npz", input_ids=np.ones((2, 3), dtype=np.int64))
    result = world.verify(world.out, "--inputs", tmp_path / "ids.npz")
    assert result.exit_code == InputError.exit_code
    assert "the artefacts take attention_mask" in result.stderr
    result = world.run(world.out, "--digests-only")
    assert result.exit_code == InputError.exit_code
    assert "--inputs asks for outputs, --digests-only for none" in result.stderr


def test_labels_are_refused_before_anything_runs(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels, base = world.place / "texts.txt", world.place / "base"
    monkeypatch.setattr(bench, "Bench", None)  # what would run the artefacts
    result = world.run(world.out, "--labels", labels, "--against", base)
    assert result.exit_code == InputError.exit_code
    assert "this model makes none" in result.stderr
    result = world.run(world.out, "--labels", labels, base="nowhere")
    assert result.exit_code == InputError.exit_code
    assert "labels say by what two models agree, and there is one model" in result.stderr
    result = world.run(
        world.out, "--labels", world.place / "no.txt", "--against", base, base="nowhere"
    )
    assert result.exit_code == InputError.exit_code
    assert "no.txt" in result.stderr


def test_a_tuned_model_of_another_kind_is_refused_before_anything_runs(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "Bench", None)
    other = pico.bert_classifier(tmp_path / "tuned", labels=7)
    result = world.run(world.out, "--against", other)
    assert result.exit_code == InputError.exit_code
    assert "puts out logits of shape (3, 7), the merged model (3, 3)" in result.stderr


def test_inputs_of_another_kind_of_number(world: World, tmp_path: Path) -> None:
    mask = np.ones((2, 3))
    np.savez(tmp_path / "in.npz", input_ids=mask.astype(np.int64), attention_mask=mask)
    result = world.verify(world.out, "--inputs", tmp_path / "in.npz")
    assert result.exit_code == InputError.exit_code
    assert "attention_mask" in result.stderr
    assert "Traceback" not in result.stderr


def ignoring_the_mask(folder: Path) -> Path:
    """Let the ONNX file take a mask of ones whatever it is given."""
    model = onnx.load(folder / MODEL)
    for node in model.graph.node:
        node.input[:] = ["ones" if name == "attention_mask" else name for name in node.input]
    equal = onnx.helper.make_node("Equal", ["attention_mask", "attention_mask"], ["true"])
    cast = onnx.helper.make_node("Cast", ["true"], ["ones"], to=onnx.TensorProto.INT64)
    model.graph.node.insert(0, equal)
    model.graph.node.insert(1, cast)
    onnx.save(model, folder / MODEL)
    return honest(folder)


@pytest.mark.parametrize("texts", ["long", "one", "mixed"])
def test_a_file_that_ignores_the_mask(world: World, tmp_path: Path, texts: str) -> None:
    """Texts that fill every shape leave no padding of their own."""
    words = pico.WORDS.split()
    lengths = {"long": (20, 25, 22), "one": (5,), "mixed": (2, 9, 4)}[texts]
    (tmp_path / "in.txt").write_text("".join(" ".join(words[:n]) + "\n" for n in lengths))
    right, wrong = world.copied(tmp_path / "a"), ignoring_the_mask(world.copied(tmp_path / "b"))
    assert world.verify(right, "--inputs", tmp_path / "in.txt").exit_code == 0
    result = world.verify(wrong, "--inputs", tmp_path / "in.txt")
    assert result.exit_code == ProofError.exit_code
    assert "logits at the usual shape" in result.stderr


def test_shapes_that_were_cut_are_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: 2 * plan.BYTES * 2 * pico.LABELS)
    monkeypatch.setattr(blockwise, "needed", lambda _module: 0)  # outputs alone are scarce here
    result = world.run(world.out, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    [note] = found["notes"]
    assert note.startswith("compared at 2x9, not 3x9, whose outputs take ")
    file = next(r for r in found["results"] if r["runner"] == "onnxruntime-cpu")
    assert [check["shape"] for check in file["checks"]] == [[1, 1], [2, 4], [2, 9]]
    result = world.run(world.out)
    assert f"warning: {note}" in result.stderr


def test_a_merged_model_alone_is_run_in_torch(world: World) -> None:
    result = world.run(world.place / "merged", "--limit", "4", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["inputs"]["rows"] == 4
    assert {result["artefact"] for result in found["results"]} == {"merged model"}
    assert found["results"][0]["update"]["logits"] == pytest.approx(1.0, abs=1e-3)


def test_a_new_head_comes_from_the_delta(tmp_path: Path) -> None:
    """The base has no head: it is given the delta's, so that the update in the encoder counts."""
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(pico.LABELS, pico.WIDTH)).astype(np.float32)
    head = {
        "classifier.bias": RawTensor.copy_of(rng.normal(size=pico.LABELS).astype(np.float32)),
        "classifier.weight": RawTensor.copy_of(weight),
    }
    world = make(tmp_path, "bert", extras=head)
    config = pico.bert_classifier(tmp_path / "config")
    result = world.run("--config", config, "--json")
    assert result.exit_code == 0, result.output
    assert list(json.loads(result.stdout)["results"][0]["update"]) == ["logits"]
    result = world.run()
    assert "no place for classifier.bias" in result.stderr


def test_labels_turn_embeddings_into_choices(tmp_path: Path) -> None:
    base = pico.sentence_bert(tmp_path / "base")
    delta(base, Nola(rank=2, bases=9), patterns=MATRICES).save(tmp_path / "task.kd")
    (tmp_path / "texts.txt").write_text("".join(f"{text}\n" for text in pico.TEXTS))
    (tmp_path / "labels.txt").write_text("rain\nold mill\nbirds\n")
    kilodelta.merge(base, tmp_path / "task.kd", tmp_path / "merged")
    result = World(place=tmp_path).run(
        "--against", tmp_path / "merged", "--labels", tmp_path / "labels.txt", "--json"
    )
    assert result.exit_code == 0, result.output
    embedding, labels = json.loads(result.stdout)["agreement"]
    assert (embedding["output"], embedding["merged"]["top1"]) == ("sentence_embedding", None)
    assert (labels["output"], labels["merged"]["top1"]) == ("labels", 1.0)
    assert labels["merged"]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert labels["base"]["kl"] > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "vit", "resnet"])
def test_every_architecture_end_to_end(name: str, tmp_path: Path) -> None:
    world = make(tmp_path, name)
    sizes = SIZES if name in {"gpt2", "llama"} else {"batch": SIZES["batch"]}
    base, file = tmp_path / "base", tmp_path / "task.kd"
    export(base, file, world.out, dtype=["fp32", "fp16"], profile=profile(sizes))
    np.savez(tmp_path / "images.npz", pixel_values=pico.pixels()["pixel_values"].numpy())
    inputs = "texts.txt" if "sequence" in sizes else "images.npz"
    result = world.verify(world.out, "--inputs", tmp_path / inputs, "--require", "ort-cpu")
    assert result.exit_code == 0, result.output
