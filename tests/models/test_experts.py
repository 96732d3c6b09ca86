"""Mixture-of-experts models with fused experts: a float64 reference, and graphs for any length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import torch
from onnxruntime import InferenceSession

from kilodelta.export.onnx.make import export_template
from kilodelta.export.onnx.save import save
from kilodelta.export.onnx.template import fill_template
from kilodelta.models import LoadedModel, experts, open_model, outputs
from kilodelta.verify.runners.torch_runner import TorchRunner

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
}
FUSED = {"gpt_oss": {"head_dim": 8, "sliding_window": 16}, "granitemoe": {}}
"""Model types whose files hold the experts fused, with what each needs beside `SIZES`."""


@pytest.fixture(scope="module", params=FUSED)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **SIZES, **FUSED[request.param])
    place = tmp_path_factory.mktemp(request.param)
    AutoModelForCausalLM.from_config(config).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return open_model(folder)


def tokens(rows: int, length: int) -> dict[str, Any]:
    chance = np.random.default_rng(length)
    ids = chance.integers(0, SIZES["vocab_size"], (rows, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def implementation(module: torch.nn.Module) -> str:
    return str(module.config._experts_implementation)  # type: ignore[union-attr]


def test_the_reference_is_computed_in_float64_and_the_model_stays(loaded: LoadedModel) -> None:
    before = implementation(loaded.module)
    batch = tokens(2, 9)
    wide = TorchRunner(loaded.view(), ["logits"], precision="float64", device="cpu").run(batch)
    narrow = TorchRunner(loaded.view(), ["logits"], precision="float32", device="cpu").run(batch)
    assert wide["logits"].dtype == np.float64
    error = np.linalg.norm(narrow["logits"] - wide["logits"]) / np.linalg.norm(wide["logits"])
    assert 0 < error < 1e-5  # float32's own rounding, so the experts computed alike
    assert implementation(loaded.module) == before


@pytest.mark.parametrize("folder", ["gpt_oss"], indirect=True)  # each export takes seconds
def test_a_graph_computes_the_experts_at_other_sizes(
    folder: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    template = export_template(loaded)
    assert {"batch", "sequence"} <= template.sizes.keys()
    assert any(len(shape) == 3 for shape in template.weights.values())  # named, and fused
    save(fill_template(template, folder), tmp_path / "model.onnx", external=False)
    session = InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for rows, length in ((1, 1), (2, 5), (3, 30)):
        batch = tokens(rows, length)
        [logits] = session.run(["logits"], batch)
        expected = outputs(loaded, {n: torch.from_numpy(a) for n, a in batch.items()})["logits"]
        np.testing.assert_allclose(logits, expected.detach().numpy(), atol=2e-5)


def test_a_module_without_experts_stays_as_it_is() -> None:
    experts.use(torch.nn.Linear(2, 2), experts.EXPORTED)
