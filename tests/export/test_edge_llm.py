"""Side-cars for TensorRT Edge-LLM: names, shapes and values as its documentation states them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from kilodelta.errors import (
    BaseMismatchError,
    CheckpointError,
    ExportError,
    InputError,
    OutputError,
)
from kilodelta.export.edge_llm import export_edge_llm
from kilodelta.export.peft.adapter import PeftOptions, export_peft
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.methods import Lora, Nola, RandLora
from kilodelta.format.targets import Patterns
from kilodelta.merging.rebase import rebase
from tests.support import grids, making, pico

LAYERS = Patterns(include=("*_proj.weight",))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return pico.llama(tmp_path_factory.mktemp("edge") / "llama")


def graph_of(pairs: dict[str, tuple[int, int]], path: Path) -> Path:
    """A graph with the LoRA inputs that `insert-lora` is documented to add, and one other."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    ports = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])]
    for stem, (in_, out) in pairs.items():
        for side, shape in (("A", [in_, f"{stem}.rank"]), ("B", [f"{stem}.rank", out])):
            name = f"{stem}.lora_{side}.weight"
            ports.append(helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape))
    onnx.save(helper.make_model(helper.make_graph([], "lora", ports, [])), path)
    return path


def processed(adapter: Path) -> dict[str, Any]:
    """What the documented `process-lora` makes of a PEFT adapter, where no width equals the rank:
    B times alpha / r, both turned round, float16, names without `base_model.model.`."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    made = {}
    for key, values in load_file(adapter / "adapter_model.safetensors").items():
        scale = config["lora_alpha"] / config["r"] if "lora_B" in key else 1.0
        name = key.removeprefix("base_model.model.")
        name = name if name.startswith("model.") else f"model.{name}"
        made[name] = (values * scale).T.astype(np.float16)
    return made


@pytest.mark.parametrize("method", [Lora(rank=3), Nola(rank=2, bases=40)])
def test_the_files_hold_the_update_by_the_documented_names(
    base: Path, method: Any, tmp_path: Path
) -> None:
    delta = making.delta(base, method, patterns=LAYERS)
    made = export_edge_llm(base, delta, tmp_path / "task", max_rank=3)
    assert sorted(p.name for p in made.path.iterdir()) == [
        "config.json",
        "processed_adapter_model.safetensors",
    ]
    tensors = load_file(made.weights)
    assert len(tensors) == 2 * made.targets == 2 * len(delta.targets)
    bound = delta.bind(Checkpoint.open(base))
    for name, target in bound.targets.items():
        stem = name.removesuffix(".weight")
        A, B = tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"]
        out, in_ = target.matrix
        assert A.dtype == B.dtype == np.float16
        assert (A.shape, B.shape) == ((in_, made.rank), (made.rank, out))
        update = bound.update(name)
        lost = np.linalg.norm(A.astype(float) @ B.astype(float) - update.T)
        # Two factors, each rounded to float16's eleven bits.
        assert lost < 2**-10 * np.linalg.norm(update)
    config = json.loads((made.path / "config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (made.rank, made.rank)
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert not config["use_rslora"]
    export_peft(base, delta, tmp_path / "peft", PeftOptions(dtype="float16"))
    theirs = processed(tmp_path / "peft")
    assert theirs.keys() == tensors.keys()
    for key, values in tensors.items():
        np.testing.assert_array_equal(values, theirs[key], err_msg=key)


def test_a_bare_decoder_gets_the_root_that_engines_have(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    whole = transformers.AutoModelForCausalLM.from_pretrained(pico.llama(tmp_path / "whole"))
    whole.model.save_pretrained(tmp_path / "bare")
    delta = making.delta(tmp_path / "bare", Lora(rank=1), patterns=LAYERS)
    made = export_edge_llm(tmp_path / "bare", delta, tmp_path / "task")
    assert "model.layers.1.mlp.up_proj.lora_B.weight" in load_file(made.weights)


def test_names_and_shapes_are_held_against_the_graph(base: Path, tmp_path: Path) -> None:
    delta = making.delta(base, Lora(rank=2), patterns=LAYERS)
    targets = delta.bind(Checkpoint.open(base)).targets
    fits = {name.removesuffix(".weight"): t.matrix[::-1] for name, t in targets.items()}
    graph = graph_of(fits, tmp_path / "lora_model.onnx")
    assert export_edge_llm(base, delta, tmp_path / "task", graph=graph).checked
    stem = "model.layers.1.mlp.down_proj"
    turned = graph_of({**fits, stem: fits[stem][::-1]}, tmp_path / "turned.onnx")
    with pytest.raises(ExportError, match=rf"{stem} is 16 by 24 in .* and 24 by 16 in the base"):
        export_edge_llm(base, delta, tmp_path / "x", graph=turned)
    fused = {name: shape for name, shape in fits.items() if name != stem}
    with pytest.raises(ExportError, match=rf"no LoRA inputs for {stem}"):
        export_edge_llm(base, delta, tmp_path / "x", graph=graph_of(fused, tmp_path / "f.onnx"))
    with pytest.raises(CheckpointError, match="no pairs of float16 inputs"):
        export_edge_llm(base, delta, tmp_path / "x", graph=graph_of({}, tmp_path / "none.onnx"))
    with pytest.raises(CheckpointError, match="is not an ONNX file"):
        export_edge_llm(base, delta, tmp_path / "x", graph=base / "config.json")
    assert not (tmp_path / "x").exists()


def test_what_an_engine_cannot_take_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "x"
    untied = pico.llama(tmp_path / "untied", tied=False)
    gpt2 = pico.gpt2(tmp_path / "gpt2")
    for model, pattern, words in (
        (untied, "lm_head.weight", r"lm_head\.weight has no place .* no matrix of a decoder layer"),
        (base, "model.embed_tokens.weight", r"embed_tokens\.weight has no place"),
        (gpt2, "transformer.h.0.mlp.c_fc.weight", r"h\.0\.mlp\.c_fc\.weight has no place"),
    ):
        delta = making.delta(model, Lora(rank=1), patterns=Patterns(include=(pattern,)))
        with pytest.raises(ExportError, match=words):
            export_edge_llm(model, delta, out)
    norm = "model.norm.weight"
    extras = {norm: Checkpoint.open(base).raw(norm)}
    with pytest.raises(ExportError, match=r"model\.norm\.weight has no place .* stored whole"):
        export_edge_llm(base, making.delta(base, Lora(), patterns=LAYERS, extras=extras), out)
    full = making.delta(base, RandLora(rank=4), patterns=LAYERS)
    with pytest.raises(ExportError, match="full rank"):
        export_edge_llm(base, full, out)
    assert 0 < export_edge_llm(base, full, tmp_path / "svd", svd=4, max_rank=4).error < 1
    high = making.delta(base, Lora(rank=3), patterns=LAYERS)
    with pytest.raises(ExportError, match="rank 3, above the engine's 2") as caught:
        export_edge_llm(base, high, out, max_rank=2)
    assert "--max-lora-rank 3, or --svd 2" in caught.value.fix
    with pytest.raises(InputError, match="--max-rank 0"):
        export_edge_llm(base, high, out, max_rank=0)
    with pytest.raises(BaseMismatchError):
        export_edge_llm(untied, high, out)
    assert not out.exists()
    with pytest.raises(OutputError):
        export_edge_llm(base, high, tmp_path / "svd")


def test_a_quantised_base_keeps_its_codes_and_gets_the_lora_beside_them(tmp_path: Path) -> None:
    module = "model.layers.0.mlp.up_proj"
    numbers = grids.Numbers(16, 32, 32)
    codes = grids.folder(tmp_path / "w4", grids.CT, grids.pack_quantized(module, numbers))
    floats = making.write(
        tmp_path / "base.safetensors", {f"{module}.weight": ("F32", (16, 32), bytes(4 * 512))}
    )
    delta = making.delta(floats, Lora(rank=2), patterns=LAYERS)
    delta.save(tmp_path / "task.kd")
    rebase(codes, tmp_path / "task.kd", tmp_path / "w4.kd")
    own, other = (
        load_file(export_edge_llm(model, tmp_path / file, tmp_path / f"of-{file}").weights)
        for model, file in ((floats, "task.kd"), (codes, "w4.kd"))
    )
    np.testing.assert_array_equal(own[f"{module}.lora_A.weight"], other[f"{module}.lora_A.weight"])
    with pytest.raises(BaseMismatchError):
        export_edge_llm(codes, delta, tmp_path / "x")
