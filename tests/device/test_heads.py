"""Many classifiers over one encoder: each fine-tune brings a head to the same device folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("transformers")

import torch

import kilodelta
from kilodelta.device import Device, apply, bundle, release, rollback
from kilodelta.errors import ExportError, InputError
from kilodelta.files.tensor import RawTensor
from kilodelta.format.methods import Nola
from kilodelta.format.targets import Patterns
from tests.support import pico
from tests.support.making import delta

PATTERNS = Patterns(include=("encoder.*.weight",), exclude=("*LayerNorm*",))
BATCH = {
    "input_ids": np.array([[2, 5, 6, 7, 3], [2, 9, 3, 0, 0]]),
    "attention_mask": np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
}
TOLERANCE = 1e-5
"""Logits reach 6; sums of 16 products in float32 and another order: 16 x 2^-24 x 6, twice."""

LABELS = {"three": 3, "ten": 10, "other": 3}


def fine_tune(base: Path, out: Path, labels: int, seed: int) -> Path:
    """A file of an encoder that brings a classifier, and says so."""
    rng = np.random.default_rng(seed)
    extras = {
        "classifier.weight": RawTensor.copy_of(rng.normal(size=(labels, 16)).astype(np.float32)),
        "classifier.bias": RawTensor.copy_of(rng.normal(size=labels).astype(np.float32)),
    }
    made = delta(base, Nola(rank=4, bases=64), patterns=PATTERNS, seed=seed, extras=extras)
    config = {
        "architectures": ["BertForSequenceClassification"],
        "id2label": {str(index): f"L{index}" for index in range(labels)},
        "label2id": {f"L{index}": index for index in range(labels)},
    }
    replace(made, manifest=replace(made.manifest, config=config)).save(out)
    return out


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("heads")
    base = pico.bert(root / "base")
    (root / "texts.txt").write_text("\n".join(pico.TEXTS))
    texts = str(root / "texts.txt")
    for seed, (name, labels) in enumerate(LABELS.items(), 1):
        file = fine_tune(base, root / f"{name}.kd", labels, seed)
        release(base, file, root / f"{name}-1.kd", version=seed, inputs=texts)
    for mode in ("adapter", "patch"):
        bundle(base, root / mode, mode=mode, rank=4, probe=texts, config=str(root / "three.kd"))
    return root


@torch.no_grad()
def wanted(root: Path, name: str, tmp_path: Path) -> Any:
    """The logits of the merged folder, opened by transformers."""
    import transformers

    kilodelta.merge(root / "base", root / f"{name}.kd", tmp_path / name)
    auto = transformers.AutoModelForSequenceClassification
    opened = auto.from_pretrained(tmp_path / name).eval()
    return opened(**{key: torch.from_numpy(array) for key, array in BATCH.items()}).logits.numpy()


def test_adapter_mode_takes_heads_of_any_number_of_labels(root: Path, tmp_path: Path) -> None:
    served = Device(root / "adapter")
    logits = {name: wanted(root, name, tmp_path) for name in LABELS}
    for name, labels in LABELS.items():
        done = apply(root / "adapter", root / f"{name}-1.kd")
        assert done.seen.errors["logits"].relative_l2 < 1e-5  # the file's own golden outputs
        found = served.run(BATCH)["logits"]
        assert found.shape == (2, labels)
        np.testing.assert_allclose(found, logits[name], rtol=0, atol=TOLERANCE)
    other = served.run(BATCH, delta=root / "ten.kd")["logits"]
    np.testing.assert_allclose(other, logits["ten"], rtol=0, atol=TOLERANCE)
    rollback(root / "adapter")
    assert served.run(BATCH)["logits"].shape == (2, 10)


def test_patch_mode_takes_heads_of_the_labels_that_it_was_made_with(
    root: Path, tmp_path: Path
) -> None:
    served = Device(root / "patch")
    for name in ("three", "other"):
        apply(root / "patch", root / f"{name}-1.kd")
        found = served.run(BATCH)["logits"]
        np.testing.assert_allclose(found, wanted(root, name, tmp_path), rtol=0, atol=TOLERANCE)
    with pytest.raises(ExportError, match=r"classifier\.bias: its shape is \(10,\)"):
        apply(root / "patch", root / "ten-1.kd", allow_downgrade=True)
    assert served.run(BATCH)["logits"].shape == (2, 3)


def test_a_file_without_a_head_is_refused_where_one_is_needed(root: Path, tmp_path: Path) -> None:
    bare = delta(root / "base", Nola(rank=4, bases=64), patterns=PATTERNS)
    bare.save(tmp_path / "bare.kd")
    for mode, kind in (("adapter", InputError), ("patch", ExportError)):
        with pytest.raises(kind, match=r"brings no classifier\.bias"):
            apply(root / mode, tmp_path / "bare.kd", allow_downgrade=True)


def test_rows_of_one_batch_take_heads_of_their_own(root: Path, tmp_path: Path) -> None:
    base = root / "base"
    folder = tmp_path / "slots"
    bundle(base, folder, mode="adapter", rank=4, slots=2, config=str(root / "three.kd"))
    deltas = [str(root / "other.kd"), str(root / "three.kd")]
    found = Device(folder).run(BATCH, deltas=deltas)["logits"]
    for row, name in enumerate(("other", "three")):
        expected = wanted(root, name, tmp_path)[row]
        np.testing.assert_allclose(found[row], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "refit", "engine": ["sm89"], "config": "x"}, "keeps the base's own head"),
        ({"mode": "patch", "whole": ["*"]}, "--whole is an option of adapter mode"),
        ({"mode": "adapter", "flavour": "tensorrt"}, "--flavour is of an engine"),
        ({"mode": "patch", "onnx": True}, "--onnx is of an engine"),
        ({"mode": "patch", "model": "a:b", "config": "x"}, "both name an architecture"),
        ({"mode": "patch", "config": "nowhere"}, "nowhere is not a configuration file"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: dict[str, Any], said: str, root: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        bundle(root / "base", tmp_path / "device", **options)
    assert not (tmp_path / "device").exists()
