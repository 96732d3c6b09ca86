"""What docs/serving.md says of OpenVINO, in the real OpenVINO; the oracle is ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")
pytest.importorskip("openvino")

import openvino

from kilodelta.export.adapter.factors import base_factors, expand
from kilodelta.export.pipeline import export
from kilodelta.export.triton.repository import write_repository
from kilodelta.format.targets import Patterns
from tests.support.adapting import base, fine_tune, graph, plain_file, run, within_gate

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

LAYERS = Patterns(include=("bert.encoder.*dense.weight", "bert.encoder.*self.*.weight"))


def compiled(path: Path) -> Any:
    """Open a model in float32; OpenVINO computes in bfloat16 where a processor is fast in it."""
    core = openvino.Core()
    core.set_property("CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return core.compile_model(str(path), "CPU")


def inputs_of(model: Any) -> set[str]:
    return {name for port in model.inputs for name in port.get_names()}


def outputs(model: Any, feeds: dict[str, Any]) -> Any:
    return model(feeds)[0]


def test_optional_inputs_are_frozen_to_the_base(tmp_path: Path) -> None:
    """The layout that ONNX Runtime's adapters need serves the base alone."""
    of = base("bert_classifier")
    path, layout = graph(of, tmp_path, optional=True)
    model = compiled(path)
    factors = expand(fine_tune(of, patterns=LAYERS), layout)
    assert not factors.keys() & inputs_of(model)
    plain = run(plain_file(of, tmp_path), of.feeds)
    # Logits near 1, of sums of at most 48 float32 products: some tens of 2^-24.
    np.testing.assert_allclose(outputs(model, of.feeds), plain, atol=1e-5)


def test_a_device_folders_graph_takes_each_fine_tune(tmp_path: Path) -> None:
    """Its factors are ordinary inputs, so nothing is frozen; zeros are the base."""
    of = base("bert_classifier")
    path, layout = graph(of, tmp_path)
    model = compiled(path)
    tunes = [fine_tune(of, patterns=LAYERS, seed=seed) for seed in (1, 2)]
    found = []
    for number, tune in enumerate(tunes):
        factors = expand(tune, layout)
        assert factors.keys() <= inputs_of(model)
        found.append(outputs(model, {**of.feeds, **factors}))
        (tmp_path / str(number)).mkdir()
        assert within_gate(of, tune, tmp_path / str(number), found[-1])
    assert not np.allclose(found[0], found[1], atol=1e-3)
    zeros = outputs(model, {**of.feeds, **base_factors(layout)})
    np.testing.assert_allclose(zeros, run(plain_file(of, tmp_path), of.feeds), atol=1e-5)


def test_tritons_layout_is_a_merged_model(tmp_path: Path) -> None:
    of = base("bert_classifier")
    tune = fine_tune(of, patterns=LAYERS)
    tune.save(tmp_path / "task.kd")
    export(of.path, tmp_path / "task.kd", tmp_path / "out")
    made = write_repository(tmp_path / "out", tmp_path / "models", name="task")
    [path] = (tmp_path / "models").rglob("*.onnx")
    assert len(made.models) == 1
    model = compiled(path)
    assert inputs_of(model) == set(of.feeds)
    assert within_gate(of, tune, tmp_path, outputs(model, of.feeds))
