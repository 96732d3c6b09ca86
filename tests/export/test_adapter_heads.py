"""A new head in adapter mode: its tensors are inputs, and the merged model is the oracle."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")

import torch

from kilodelta.errors import ExportError, FileError, InputError
from kilodelta.export import (
    AdapterLayout,
    Template,
    base_factors,
    expand,
    export_template,
    fill_template,
    in_slots,
    read_layout,
    save,
    with_adapter,
)
from kilodelta.export.architecture import HeadedBase, open_headed
from kilodelta.export.merge.checkpoint import merge
from kilodelta.export.merged_model import open_merged
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.tensor import RawTensor
from kilodelta.format.delta import Delta
from kilodelta.format.methods import Nola
from kilodelta.format.targets import Patterns
from tests.support import pico
from tests.support.adapting import run
from tests.support.lasting import lasting_folder
from tests.support.making import delta

pytestmark = pytest.mark.filterwarnings("default")

LAYERS = Patterns(include=("encoder.*dense.weight", "encoder.*self.*.weight"))
RANK = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """A bare encoder, the configuration of its fine-tunes, and a graph template of both."""

    base: Path
    config: dict[str, Any]
    headed: HeadedBase
    template: Template
    feeds: dict[str, Any]


def settings(kind: str, labels: int) -> dict[str, Any]:
    return {
        "architectures": [kind],
        "pad_token_id": 0,
        "id2label": {str(index): f"L{index}" for index in range(labels)},
        "label2id": {f"L{index}": index for index in range(labels)},
    }


@functools.cache
def case(kind: str = "BertForSequenceClassification", model: str = "bert") -> Case:
    folder = lasting_folder("heads")
    base = pico.MODELS[model](folder / "base")
    config = json.loads((base / "config.json").read_bytes()) | settings(kind, 5)
    config["pad_token_id"] = 0
    (folder / "config.json").write_text(json.dumps(config))
    headed = open_headed(Checkpoint.open(base), config=str(folder / "config.json"))
    rng = np.random.default_rng(0)
    feeds = {
        "input_ids": rng.integers(5, pico.VOCABULARY, (4, 6)),
        "attention_mask": np.ones((4, 6), np.int64),
    }
    return Case(
        base=base,
        config=config,
        headed=headed,
        template=export_template(headed.loaded),
        feeds=feeds,
    )


def graph(of: Case, folder: Path, **options: Any) -> tuple[Path, AdapterLayout]:
    wide, layout = with_adapter(
        of.template, of.base, heads=of.headed.heads, name="pico", rank=RANK, **options
    )
    return save(fill_template(wide, of.base), folder / "adapter.onnx")[0], layout


def head(labels: int, seed: int, width: int = pico.WIDTH, name: str = "classifier") -> Any:
    rng = np.random.default_rng(seed)
    return {
        f"{name}.weight": RawTensor.copy_of(rng.normal(size=(labels, width)).astype(np.float32)),
        f"{name}.bias": RawTensor.copy_of(rng.normal(size=labels).astype(np.float32)),
    }


def fine_tune(of: Case, labels: int, seed: int = 1, **options: Any) -> Delta:
    options.setdefault("extras", head(labels, seed))
    options.setdefault("patterns", LAYERS)
    made = delta(of.base, Nola(rank=3, bases=40), seed=seed, **options)
    kind = of.config["architectures"][0]
    return replace(made, manifest=replace(made.manifest, config=settings(kind, labels)))


@torch.no_grad()
def merged_outputs(of: Case, tune: Delta, feeds: Mapping[str, Any]) -> Any:
    """The merged model's first output, in torch."""
    with tempfile.TemporaryDirectory() as folder:
        merge(of.base, tune, Path(folder, "m"))
        loaded = open_merged(Checkpoint.open(of.base), Path(folder, "m"), tune)
        batch = {name: torch.from_numpy(values) for name, values in feeds.items()}
        return next(iter(loaded.view()(**batch).values())).numpy()


def off(found: Any, wanted: Any) -> float:
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "BertForTokenClassification"])
def test_one_graph_serves_heads_of_any_number_of_labels(kind: str, tmp_path: Path) -> None:
    of = case(kind)
    path, layout = graph(of, tmp_path)
    assert [one.info.name for one in layout.stored if one.is_free] == [*head(1, 0)][::-1]
    for labels, seed in ((5, 1), (2, 2), (40, 3)):
        tune = fine_tune(of, labels, seed)
        found = run(path, {**of.feeds, **expand(tune, layout)})
        assert found.shape[-1] == labels
        assert off(found, merged_outputs(of, tune, of.feeds)) < 2e-6


def test_the_base_is_served_with_the_head_that_it_starts_from(tmp_path: Path) -> None:
    of = case()
    path, layout = graph(of, tmp_path)
    with torch.no_grad():
        batch = {name: torch.from_numpy(values) for name, values in of.feeds.items()}
        wanted = of.headed.loaded.view()(**batch)["logits"].numpy()
    assert off(run(path, {**of.feeds, **base_factors(layout)}), wanted) < 2e-6
    assert np.abs(wanted).max() > 1e-3


def test_a_half_precision_graph_takes_rounded_heads(tmp_path: Path) -> None:
    of = case()
    half = replace(of, template=export_template(of.headed.loaded, dtype="float16"))
    path, layout = graph(half, tmp_path)
    tune = fine_tune(of, 3)
    factors = expand(tune, layout)
    given = tune.extras["classifier.weight"].values()
    assert factors["classifier.weight"].dtype == np.float16
    assert np.array_equal(factors["classifier.weight"], given.astype(np.float16))
    found = run(path, {**of.feeds, **factors})
    assert off(found.astype(np.float32), merged_outputs(of, tune, of.feeds)) < 1e-2
    huge = {**tune.extras, "classifier.bias": RawTensor.copy_of(np.full(3, 1e6, np.float32))}
    with pytest.raises(ExportError, match=r"classifier\.bias holds values beyond F16"):
        expand(replace(tune, extras=huge), layout)


def test_a_head_behind_which_its_labels_count_keeps_their_number(tmp_path: Path) -> None:
    """GPT-2 picks the last token's scores behind its head: nothing proves that any size fits."""
    of = case("GPT2ForSequenceClassification", "gpt2")
    path, layout = graph(of, tmp_path)
    (stored,) = layout.stored
    assert (stored.info.name, stored.is_free, stored.is_new) == ("score.weight", False, True)
    patterns = Patterns(include=("*.c_fc.weight",), transposed=("*.c_fc.weight",))
    score = {"score.weight": head(5, 4)["classifier.weight"]}
    tune = fine_tune(of, 5, patterns=patterns, extras=score)
    found = run(path, {**of.feeds, **expand(tune, layout)})
    assert off(found, merged_outputs(of, tune, of.feeds)) < 2e-6
    more = {"score.weight": head(6, 4)["classifier.weight"]}
    with pytest.raises(InputError, match=r"score\.weight is F32 \[6, 16\] .* graph's is \[5, 16\]"):
        expand(fine_tune(of, 6, patterns=patterns, extras=more), layout)


def test_tensors_of_the_base_may_be_brought_whole(tmp_path: Path) -> None:
    """Norms beside the head; a fine-tune that leaves them alone has the base's."""
    of = case()
    path, layout = graph(of, tmp_path, whole=("*LayerNorm.bias",))
    name = "encoder.layer.1.output.LayerNorm.bias"
    shift = RawTensor.copy_of(np.linspace(-1, 1, pico.WIDTH, dtype=np.float32))
    both = fine_tune(of, 3, extras={**head(3, 1), name: shift})
    alone = fine_tune(of, 3)
    outputs = [run(path, {**of.feeds, **expand(tune, layout)}) for tune in (both, alone)]
    for tune, found in zip((both, alone), outputs, strict=True):
        assert off(found, merged_outputs(of, tune, of.feeds)) < 2e-6
    assert off(outputs[0], outputs[1]) > 1e-2
    with pytest.raises(InputError, match=r"matches \*\.nothing"):
        graph(of, tmp_path, whole=("*.nothing",))


def test_a_tensor_that_no_output_needs_may_be_brought_and_changes_nothing() -> None:
    """Token classification has no pooler."""
    of = case("BertForTokenClassification")
    _, layout = with_adapter(
        of.template, of.base, heads=of.headed.heads, whole=("pooler.*",), name="pico"
    )
    (idle,) = (one for one in layout.stored if one.info.name == "pooler.dense.bias")
    assert not idle.is_used
    bias = {"pooler.dense.bias": RawTensor.copy_of(np.zeros(16, np.float32))}
    tune = fine_tune(of, 3, extras={**head(3, 1), **bias})
    assert "pooler.dense.bias" not in expand(tune, layout)


def test_a_base_with_other_labels_takes_heads_of_its_fine_tunes(tmp_path: Path) -> None:
    """The base's own classifier has three; the fine-tune's five take its place."""
    of = case(model="bert_classifier")
    assert {n: raw.shape for n, raw in of.headed.heads.items()} == {
        "classifier.weight": (5, 16),
        "classifier.bias": (5,),
    }
    path, layout = graph(of, tmp_path)
    assert "classifier.weight" not in {one.info.name for one in layout.exposed}
    patterns = Patterns(include=tuple(f"bert.{glob}" for glob in LAYERS.include))
    tune = fine_tune(of, 5, patterns=patterns)
    found = run(path, {**of.feeds, **expand(tune, layout)})
    assert off(found, merged_outputs(of, tune, of.feeds)) < 2e-6


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "BertForTokenClassification"])
def test_each_row_of_a_batch_takes_the_head_of_its_own_fine_tune(kind: str, tmp_path: Path) -> None:
    of = case(kind)
    path, layout = graph(of, tmp_path, slots=2)
    assert {one.is_free for one in layout.stored} == {False}
    tunes = [fine_tune(of, 5, seed) for seed in (1, 2)]
    stacked = in_slots(layout, [expand(tune, layout) for tune in tunes])
    index = np.array([2, 0, 1, 2])
    found = run(path, {**of.feeds, **stacked, "adapter": index})
    (tmp_path / "plain").mkdir()
    alone, plain = graph(of, tmp_path / "plain")
    inputs = [base_factors(plain), *(expand(tune, plain) for tune in tunes)]
    wanted = [run(alone, {**of.feeds, **factors}) for factors in inputs]
    for row, chosen in enumerate(index):
        assert off(found[row], wanted[chosen][row]) < 2e-6
    assert off(wanted[1], wanted[2]) > 0.1
    with pytest.raises(InputError, match=r"is F32 \[4, 16\] .* graph's is \[5, 16\]"):
        expand(fine_tune(of, 4), layout)


def test_what_is_no_linear_head_cannot_be_brought_whole_into_slots(tmp_path: Path) -> None:
    of = case()
    with pytest.raises(ExportError, match=r"LayerNorm\.bias cannot differ from row to row"):
        graph(of, tmp_path, slots=2, whole=("*LayerNorm.bias",))


# refusals


def test_files_that_do_not_fit_the_heads_are_refused_by_name() -> None:
    of = case()
    _, layout = with_adapter(of.template, of.base, heads=of.headed.heads, name="pico", rank=RANK)
    with pytest.raises(InputError, match=r"brings no classifier\.bias, classifier\.weight"):
        expand(fine_tune(of, 3, extras={}), layout)
    whole = head(3, 1)
    zeros = RawTensor.copy_of(np.zeros(16, np.float32))
    integers = RawTensor.copy_of(np.zeros(3, np.int64))
    for extras, said in (
        ({"classifier.weight": whole["classifier.weight"]}, r"brings no classifier\.bias"),
        ({**whole, "pooler.dense.bias": zeros}, r"no inputs of the graph: pooler\.dense\.bias"),
        (head(3, 1, width=17), r"is F32 \[3, 17\] in the file, the graph's is \['any', 16\]"),
        ({**whole, "classifier.bias": integers}, r"is I64 \[3\] in the file, the graph's is F32"),
    ):
        tune = fine_tune(of, 3, extras=extras)
        with pytest.raises(InputError, match=said):
            expand(tune, layout)


def test_two_names_of_an_architecture_are_refused() -> None:
    with pytest.raises(InputError, match="both name an architecture"):
        open_headed(Checkpoint.open(case().base), config="x", model="a:b")


# the layout's files


def test_the_layout_comes_back_with_its_values(tmp_path: Path) -> None:
    of = case()
    _, layout = with_adapter(of.template, of.base, heads=of.headed.heads, name="pico")
    layout.write(tmp_path)
    found = read_layout(tmp_path)
    assert found == layout
    assert found.defaults.keys() == layout.defaults.keys() == of.headed.heads.keys()
    for name, tensor in found.defaults.items():
        assert tensor.data.tobytes() == of.headed.heads[name].data.tobytes()


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("stored", 0, "new"), 1, r"stored\[0\].new is 1"),
        (("stored", 0, "free"), None, r"stored\[0\].free is None"),
        (("stored", 0, "dtype"), "F33", r"stored\[0\].dtype is 'F33'"),
        (("stored", 0, "shape"), [-1], r"stored\[0\].shape\[0\] is -1"),
        (("stored", 0, "shape"), [6], "does not hold exactly the stored tensors"),
        (("stored", 0, "name"), "other", "does not hold exactly the stored tensors"),
        (("stored", 0, "more"), 1, "unknown key 'more'"),
        (("version",), 1, "unknown key 'stored'"),
    ],
)
def test_a_hostile_layout_is_refused_by_field(
    path: tuple[Any, ...], value: Any, said: str, tmp_path: Path
) -> None:
    of = case()
    _, layout = with_adapter(of.template, of.base, heads=of.headed.heads, name="pico")
    place = layout.write(tmp_path)
    table = json.loads(place.read_text())
    inner = table
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    place.write_text(json.dumps(table))
    with pytest.raises(FileError, match=said):
        read_layout(tmp_path)


def test_values_that_are_missing_or_damaged_are_refused(tmp_path: Path) -> None:
    of = case()
    _, layout = with_adapter(of.template, of.base, heads=of.headed.heads, name="pico")
    layout.write(tmp_path)
    values = tmp_path / "adapter.safetensors"
    values.write_bytes(values.read_bytes()[:-1])
    with pytest.raises(FileError, match=r"adapter\.safetensors"):
        read_layout(tmp_path)
    values.unlink()
    with pytest.raises(FileError, match=r"adapter\.safetensors cannot be opened"):
        read_layout(tmp_path)


def test_a_layout_of_version_1_is_read(tmp_path: Path) -> None:
    """As kilodelta 0.1 wrote them into device folders."""
    of = case("BertForSequenceClassification", "bert_classifier")
    table = {
        "version": 1,
        "base": {"name": "pico", "root": "sha256:" + "0" * 64},
        "rank": 8,
        "slots": 0,
        "dtype": "float32",
        "optional": False,
        "exposed": [
            {"name": "a.weight", "dtype": "F32", "shape": [4, 3], "use": "turned"},
        ],
    }
    (tmp_path / "adapter.json").write_text(json.dumps(table))
    found = read_layout(tmp_path)
    assert (found.stored, dict(found.inputs)) == (
        (),
        {"a.weight.lora_A": (3, 8), "a.weight.lora_B": (8, 4)},
    )
    assert of.base.is_dir()


# ONNX Runtime's own adapter files


def test_the_command_exports_the_head_that_the_file_brings(tmp_path: Path) -> None:
    """Forty classifiers over one encoder: one graph, an adapter file for each, any labels."""
    import onnxruntime as ort
    from click.testing import CliRunner

    from kilodelta.cli import main

    of, out = case(), tmp_path / "out"
    tunes = {name: fine_tune(of, labels, labels) for name, labels in (("three", 3), ("ten", 10))}
    for name, tune in tunes.items():
        tune.save(tmp_path / f"{name}.kd")
        given = ["export-adapter", of.base, tmp_path / f"{name}.kd", "-o", out, "--rank", "3"]
        done = CliRunner().invoke(main, [str(word) for word in given])
        assert done.exit_code == 0, done.output
    assert {place.name for place in out.iterdir()} == {
        *("model.onnx", "adapter.json", "adapter.safetensors"),
        *("three.onnx_adapter", "ten.onnx_adapter"),
    }
    for name, tune in tunes.items():
        adapter, options = ort.LoraAdapter(), ort.RunOptions()
        adapter.Load(str(out / f"{name}.onnx_adapter"))
        options.add_active_adapter(adapter)
        found = run(out / "model.onnx", of.feeds, options=options)
        assert off(found, merged_outputs(of, tune, of.feeds)) < 2e-6
    bare = fine_tune(of, 3, extras={})
    bare.save(tmp_path / "bare.kd")
    given = ["export-adapter", of.base, tmp_path / "bare.kd", "-o", out]
    done = CliRunner().invoke(main, [str(word) for word in given])
    assert (done.exit_code, "brings no classifier.bias" in done.output) == (9, True), done.output


def test_a_delta_file_or_a_folder_names_the_architecture(tmp_path: Path) -> None:
    of = case()
    fine_tune(of, 7).save(tmp_path / "task.kd")
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "config.json").write_text(json.dumps(of.config))
    (tmp_path / "plain.json").write_text(json.dumps(of.config))
    checkpoint = Checkpoint.open(of.base)
    for config, labels in (("task.kd", 7), ("tuned", 5), ("plain.json", 5)):
        headed = open_headed(checkpoint, config=str(tmp_path / config))
        assert headed.heads["classifier.weight"].shape == (labels, pico.WIDTH)
        assert headed.loaded.source == str(of.base)
        assert headed.weights.info("classifier.bias").shape == (labels,)
    assert open_headed(checkpoint).heads == {}
    assert open_headed(checkpoint, config=str(of.base)).weights is checkpoint
    with pytest.raises(InputError, match="is not a configuration file"):
        open_headed(checkpoint, config=str(tmp_path / "nothing"))


def test_a_head_takes_the_place_of_the_pooling_of_a_sentence_encoder(tmp_path: Path) -> None:
    """`modules.json` is of the base alone: with another head the outputs are its logits."""
    base = pico.sentence_bert(tmp_path / "base")
    fine_tune(case(), 7).save(tmp_path / "task.kd")
    headed = open_headed(Checkpoint.open(base), config=str(tmp_path / "task.kd"))
    assert headed.heads["classifier.weight"].shape == (7, pico.WIDTH)
    assert type(headed.loaded.module).__name__ == "BertForSequenceClassification"
    assert open_headed(Checkpoint.open(base)).loaded.pooling is not None
