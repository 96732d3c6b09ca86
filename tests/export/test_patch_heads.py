"""A new head in patch mode: its bytes in the file are written like any other tensor's."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")

from kilodelta.errors import ExportError
from kilodelta.export import (
    Template,
    export_template,
    fill_template,
    make_map,
    open_patched,
    patch,
    read_map,
    save,
    write_map,
    write_rest,
)
from kilodelta.export.architecture import HeadedBase, open_headed
from kilodelta.export.merge.checkpoint import merge
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.tensor import RawTensor
from kilodelta.format.delta import Delta
from kilodelta.format.methods import Nola
from kilodelta.format.targets import Patterns
from tests.support import making, pico
from tests.support.lasting import lasting_folder

pytestmark = pytest.mark.filterwarnings("default")

LAYERS = Patterns(include=("encoder.*dense.weight", "encoder.*self.*.weight"))
LABELS = 5


@dataclass(frozen=True, kw_only=True)
class Case:
    base: Path
    headed: HeadedBase
    template: Template


@functools.cache
def case(name: str = "bert", dtype: str = "float32") -> Case:
    folder = lasting_folder("patch-heads")
    base = pico.MODELS[name](folder / "base")
    config = json.loads((base / "config.json").read_bytes())
    config |= {
        "architectures": ["BertForSequenceClassification"],
        "id2label": {str(index): f"L{index}" for index in range(LABELS)},
        "label2id": {f"L{index}": index for index in range(LABELS)},
    }
    (folder / "config.json").write_text(json.dumps(config))
    headed = open_headed(Checkpoint.open(base), config=str(folder / "config.json"))
    return Case(base=base, headed=headed, template=export_template(headed.loaded, dtype=dtype))


def exported(of: Case, folder: Path, **options: Any) -> tuple[Path, Any]:
    folder.mkdir()
    path = save(fill_template(of.template, of.headed.weights), folder / "m.onnx", **options)[0]
    return path, make_map(path, of.base, heads=of.headed.heads, unused=of.template.unused)


def head(labels: int = LABELS) -> dict[str, RawTensor]:
    rng = np.random.default_rng(labels)
    return {
        "classifier.weight": RawTensor.copy_of(rng.normal(size=(labels, 16)).astype(np.float32)),
        "classifier.bias": RawTensor.copy_of(rng.normal(size=labels).astype(np.float32)),
    }


def fine_tune(of: Case, extras: Any = None, patterns: Patterns = LAYERS) -> Delta:
    extras = head() if extras is None else extras
    return making.delta(of.base, Nola(rank=3, bases=40), patterns=patterns, extras=extras)


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_patched_file_is_our_export_of_the_merged_model(
    dtype: str, external: bool, tmp_path: Path
) -> None:
    of = case(dtype=dtype)
    path, places = exported(of, tmp_path / "base", external=external)
    assert set(places.heads) == {"classifier.weight", "classifier.bias"}
    tune = fine_tune(of)
    merge(of.base, tune, tmp_path / "merged")
    (tmp_path / "wanted").mkdir()
    wanted = save(
        fill_template(of.template, tmp_path / "merged"),
        tmp_path / "wanted" / "m.onnx",
        external=external,
    )
    write_map(places, tmp_path / "map.json")
    rest = write_rest(places, of.base, tmp_path / "rest.safetensors")
    (tmp_path / "tuned").mkdir()
    done = patch(
        path,
        tune,
        tmp_path / "tuned" / "m.onnx",
        places=read_map(tmp_path / "map.json"),
        base=rest,
    )
    assert done.extras == 2
    for ours, theirs in zip(done.files, wanted, strict=True):
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_session_has_the_head_without_a_new_file(tmp_path: Path) -> None:
    import onnxruntime

    of = case()
    path, places = exported(of, tmp_path / "base", external=True)
    tune = fine_tune(of)
    patch(path, tune, tmp_path / "m.onnx", places=places, base=of.base)
    feeds = {"input_ids": np.full((2, 5), 7), "attention_mask": np.ones((2, 5), np.int64)}
    (found,) = open_patched(path, tune, places=places, base=of.base).run(None, feeds)
    (wanted,) = onnxruntime.InferenceSession(str(tmp_path / "m.onnx")).run(None, feeds)
    assert found.shape == (2, LABELS)
    assert np.array_equal(found, wanted)


def test_a_head_in_the_place_of_the_bases_own(tmp_path: Path) -> None:
    """The base's classifier has three labels; five rows take its place, under its name."""
    of = case("bert_classifier")
    path, places = exported(of, tmp_path / "base")
    assert places.tensors["classifier.weight"].shape == (pico.LABELS, 16)
    assert places.heads["classifier.weight"].shape == (LABELS, 16)
    patterns = Patterns(include=tuple(f"bert.{glob}" for glob in LAYERS.include))
    tune = fine_tune(of, patterns=patterns)
    patch(path, tune, tmp_path / "t.onnx", places=places, base=of.base)
    held = {t.name: t.raw_data for t in _graph(tmp_path / "t.onnx").initializer}
    assert held["classifier.weight"] == tune.extras["classifier.weight"].data.tobytes()
    wrong = fine_tune(of, extras={}, patterns=Patterns(include=("classifier.weight",)))
    with pytest.raises(ExportError, match="exported with a new head in its place"):
        patch(path, wrong, tmp_path / "w.onnx", places=places, base=of.base)


def _graph(path: Path) -> Any:
    import onnx

    return onnx.load(str(path)).graph


def test_files_that_do_not_fit_the_head_are_refused_by_name(tmp_path: Path) -> None:
    of = case()
    path, places = exported(of, tmp_path / "base")
    zeros = RawTensor.copy_of(np.zeros(3, np.float32))
    for extras, said, way in (
        ({}, r"brings no classifier\.bias, classifier\.weight", "made without --config"),
        ({"classifier.weight": head()["classifier.weight"]}, r"brings no classifier\.bias", ""),
        (head(4), r"classifier\.bias: its shape is \(4,\), the file's \(5,\)", "of this shape"),
        ({**head(), "other": zeros}, "other: the base has no tensor of that name", ""),
    ):
        with pytest.raises(ExportError, match=said) as refused:
            patch(path, fine_tune(of, extras), tmp_path / "t.onnx", places=places, base=of.base)
        assert way in refused.value.fix
    assert not (tmp_path / "t.onnx").exists()


def test_a_map_of_version_1_is_read(tmp_path: Path) -> None:
    """As kilodelta 0.1 wrote them into device folders."""
    of = case()
    _, places = exported(of, tmp_path / "base")
    old = replace(
        places, heads={}, places={n: p for n, p in places.places.items() if n in places.tensors}
    )
    write_map(old, tmp_path / "map.json")
    table = json.loads((tmp_path / "map.json").read_bytes())
    del table["heads"]
    table["version"] = 1
    (tmp_path / "old.json").write_text(json.dumps(table))
    assert read_map(tmp_path / "old.json") == old
