"""Decoders with their cache: the graph, ONNX Runtime GenAI's layout, and the texts they write."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kilodelta.compress import Options, compress
from kilodelta.errors import CheckpointError, ExportError, InputError, KiloDeltaError
from kilodelta.export import export
from kilodelta.export.decoder.genai import CONFIG, genai_config
from kilodelta.export.decoder.template import cached_template
from kilodelta.export.decoder.trial import run_in_pieces, try_steps
from kilodelta.export.manifest import artefacts
from kilodelta.export.manifest.facts import Port, misfit
from kilodelta.export.merged_model import merged_weights, open_merged
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.file import load
from kilodelta.format.methods import Lora
from kilodelta.models import open_model
from kilodelta.models.generation.cache import cache_layers
from kilodelta.models.generation.special_tokens import SpecialTokens, special_tokens
from kilodelta.verify import verify
from kilodelta.verify.generation import compare
from kilodelta.verify.generation.writers import GenaiWriter, OnnxWriter, Written
from tests.support import pico

pytest.importorskip("onnxruntime")

PROMPTS = ([2, 11, 5, 30, 7], [9], [2, 40, 41, 42, 43, 44, 45, 46, 47])
MOST = 14


@dataclasses.dataclass(frozen=True)
class Case:
    base: Path
    delta: Path
    out: Path

    def merged(self) -> Any:
        """The merged model, as transformers has it."""
        base = Checkpoint.open(self.base)
        delta = load(self.delta, base=base)
        with merged_weights(base, delta) as weights:
            return open_merged(base, weights, delta)


def fine_tune(folder: Path, architecture: str) -> Case:
    """A base, a large change of it in a file, and the export with its cache."""
    base = getattr(pico, architecture)(folder / "base")
    tuned = pico.tuned(base, folder / "tuned", size=0.3)
    delta = folder / "task.kd"
    compress(base, tuned, delta, options=Options(method=Lora(rank=4)))
    export(base, delta, folder / "out", kv_cache=True)
    return Case(base=base, delta=delta, out=folder / "out")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return fine_tune(tmp_path_factory.mktemp("llama"), "llama")


def greedy(model: Any, ids: Sequence[int]) -> list[int]:
    """What transformers itself writes after a prompt, an end token included."""
    written = model.module.generate(
        input_ids=torch.tensor([list(ids)]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=MOST,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )
    return [int(n) for n in written[0, len(ids) :]]


def texts(case: Case, writer: Any, end: Sequence[int]) -> list[list[int]]:
    assert writer.available() is None
    return [list(writer.write(ids, MOST, end).chosen) for ids in PROMPTS]


def check_texts(case: Case) -> None:
    """Both runtimes write what transformers writes, from the merged model."""
    merged = case.merged()
    end = special_tokens(merged, case.base).end
    expected = [greedy(merged, ids) for ids in PROMPTS]
    assert expected != [greedy(open_model(case.base), ids) for ids in PROMPTS]
    path = case.out / "model.fp32.onnx"
    assert texts(case, OnnxWriter(path), end) == expected
    pytest.importorskip("onnxruntime_genai")
    assert texts(case, GenaiWriter(case.out), end) == expected


def test_the_graph_has_prompts_and_steps_in_one(llama: Case) -> None:
    made = artefacts.read(llama.out).artefacts[0]
    assert [port.name for port in made.inputs] == [
        "input_ids",
        "attention_mask",
        "position_ids",
        "past_key_values.0.key",
        "past_key_values.0.value",
        "past_key_values.1.key",
        "past_key_values.1.value",
    ]
    shapes = {port.name: port.shape for port in (*made.inputs, *made.outputs)}
    assert shapes["attention_mask"] == ("batch", "total_sequence")
    assert shapes["past_key_values.1.value"] == ("batch", 2, "past_sequence", 4)
    assert shapes["logits"] == ("batch", "sequence", pico.VOCABULARY)
    # A prompt comes with an empty cache, a step with a full one: both are in the profile.
    assert made.profile["past_key_values.0.key"] == ((1, 2, 0, 4), (1, 2, 31, 4), (8, 2, 31, 4))


def test_both_runtimes_write_what_transformers_writes(llama: Case) -> None:
    check_texts(llama)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt2", "qwen2", "mistral", "gemma3", "opt", "bloom"])
def test_other_decoders_write_what_transformers_writes(architecture: str, tmp_path: Path) -> None:
    check_texts(fine_tune(tmp_path, architecture))


def test_genai_layout(llama: Case) -> None:
    config = json.loads((llama.out / CONFIG).read_text())
    decoder = config["model"]["decoder"]
    assert decoder["filename"] == "model.fp32.onnx"
    sizes = ("head_size", "hidden_size", "num_attention_heads", "num_key_value_heads")
    assert [decoder[name] for name in sizes] == [4, 16, 4, 2]
    assert decoder["num_hidden_layers"] == 2
    assert config["model"]["vocab_size"] == pico.VOCABULARY
    assert config["model"]["eos_token_id"] == [3]
    assert config["search"]["past_present_share_buffer"] is False
    # Every file is in the manifest: what a device receives is checked whole.
    manifest = artefacts.read(llama.out)
    files = {file.file for artefact in manifest.artefacts for file in artefact.files}
    assert files == {place.name for place in llama.out.iterdir()} - {artefacts.MANIFEST}
    assert {"tokenizer.json", "tokenizer_config.json", CONFIG} <= files
    artefacts.check_files(llama.out, manifest)


def test_genai_is_never_told_of_a_graph_without_a_cache(tmp_path: Path) -> None:
    loaded = open_model(pico.llama(tmp_path / "base"))
    plain = dataclasses.replace(
        _template(),
        inputs=(Port(name="input_ids", dtype="int64", shape=("batch", "sequence")),),
        outputs=(Port(name="logits", dtype="float32", shape=("batch", "sequence", 48)),),
    )
    with pytest.raises(ExportError, match=r"model\.onnx has no cache"):
        genai_config("model.onnx", plain, loaded, SpecialTokens(begin=2, end=(3,), pad=0))


def _template() -> Any:
    from kilodelta.export.onnx.template import Template

    return Template(
        model=None, dtype="float32", weights={}, unused=(), inputs=(), outputs=(), opset=18
    )


def test_end_tokens_of_the_generation_configuration_win(tmp_path: Path) -> None:
    base = pico.llama(tmp_path / "base")
    (base / "generation_config.json").write_text('{"eos_token_id": [5, 3], "pad_token_id": 1}')
    loaded = open_model(base)
    assert special_tokens(loaded, base) == SpecialTokens(begin=2, end=(5, 3), pad=1)
    (base / "generation_config.json").write_text(f'{{"eos_token_id": [{10**30}, -1, true, 3]}}')
    assert special_tokens(loaded, base).end == (3,)
    (base / "generation_config.json").write_text('{"eos_token_id": ' + "[" * 100_000)
    with pytest.raises(CheckpointError, match=r"generation_config\.json is not JSON"):
        special_tokens(loaded, base)


def test_verify_generates(llama: Case, tmp_path: Path) -> None:
    inputs = tmp_path / "chat.jsonl"
    inputs.write_text('{"text": "a river runs"}\n{"prompt": "rain", "completion": "came"}\n')
    found = verify(llama.base, llama.delta, [llama.out], inputs=inputs, generate=8)
    assert found.failure is None
    assert found.report is not None
    runners = [result.runner for result in found.report.results if result.status == "passed"]
    assert runners[0] == "onnxruntime-cpu"
    for result in found.report.results:
        if result.status == "passed":
            assert {check.output for check in result.checks} == {"logits", compare.TEXT}
            assert result.update["logits"] == pytest.approx(1, abs=1e-3)


def test_a_token_that_the_model_would_not_choose_fails(
    llama: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tmp_path / "a.txt"
    inputs.write_text("a river runs\n")
    write = OnnxWriter.write

    def wrong(self: OnnxWriter, ids: Sequence[int], most: int, end: Sequence[int]) -> Written:
        text = write(self, ids, most, end)
        last = (text.chosen[-1] + 1) % pico.VOCABULARY
        return dataclasses.replace(text, chosen=(*text.chosen[:-1], last))

    monkeypatch.setattr(OnnxWriter, "write", wrong)
    monkeypatch.setattr(compare, "_genai", lambda folder, artefact: [])
    found = verify(llama.base, llama.delta, [llama.out], inputs=inputs, generate=3)
    assert found.failure is not None
    assert "greedy text at the text 1 shape 1x3" in found.failure.what


def test_a_cached_export_is_compared_by_what_it_writes(llama: Case, tmp_path: Path) -> None:
    inputs = tmp_path / "a.txt"
    inputs.write_text("rain\n")
    with pytest.raises(InputError, match="has a cache, so it is compared by what it writes"):
        verify(llama.base, llama.delta, [llama.out], inputs=inputs)
    with pytest.raises(InputError, match="no decoder with a cache"):
        verify(llama.base, llama.delta, inputs=inputs, generate=4)


class Swapped:
    """A session that mixes up two tensors of the cache that have one shape."""

    def __init__(self, session: Any) -> None:
        self.session = session

    def get_inputs(self) -> Any:
        return self.session.get_inputs()

    def get_outputs(self) -> Any:
        return self.session.get_outputs()

    def run(self, names: Any, fed: dict[str, Any]) -> Any:
        a, b = "past_key_values.0.key", "past_key_values.1.key"
        return self.session.run(names, {**fed, a: fed[b], b: fed[a]})


def test_a_cache_that_is_mixed_up_is_noticed(llama: Case) -> None:
    import onnxruntime

    merged = llama.merged()
    session = onnxruntime.InferenceSession(llama.out / "model.fp32.onnx")
    layers = cache_layers(merged)
    try_steps(session, merged, layers, "float32")
    with pytest.raises(ExportError, match=r"logits are off by .*, relative"):
        try_steps(Swapped(session), merged, layers, "float32")


def test_a_text_in_pieces_is_the_text_at_once(llama: Case) -> None:
    import onnxruntime

    merged = llama.merged()
    session = onnxruntime.InferenceSession(llama.out / "model.fp32.onnx")
    ids = torch.tensor([[2, 11, 5, 30, 7, 8, 9], [2, 12, 6, 31, 8, 9, 10]])
    with torch.no_grad():
        expected = merged.module(ids).logits.numpy()
    for pieces in ([7], [1] * 7, [3, 4], [5, 1, 1]):
        mask = torch.ones_like(ids)
        logits = run_in_pieces(session, merged, cache_layers(merged), ids, mask, pieces)
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [("bert", "puts out no logits for every token"), ("vit", "takes no past_key_values")],
)
def test_what_is_no_decoder_is_refused(architecture: str, reason: str, tmp_path: Path) -> None:
    loaded = open_model(getattr(pico, architecture)(tmp_path / "base"))
    with pytest.raises(ExportError, match=reason) as caught:
        cached_template(loaded)
    assert caught.value.fix == "export it without --kv-cache"


def test_a_state_space_model_is_refused(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=32, hidden_size=8, state_size=4, num_hidden_layers=1, eos_token_id=3
    )
    MambaForCausalLM(config).save_pretrained(tmp_path / "base")
    with pytest.raises(ExportError, match="cannot be exported with a cache: it "):
        cached_template(open_model(tmp_path / "base"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"inputs": "a.npz"}, "--kv-cache and --inputs"),
        ({"outputs": ["logits"]}, "--kv-cache and --outputs"),
        ({"triton": "models"}, "Triton keeps no cache"),
        ({"dtype": ["fp32", "fp16"]}, "2 precisions were asked for"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        export("base", "task.kd", "out", kv_cache=True, **options)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"time": (1, 2, 3)}, "no axis time"),
        ({"sequence": (1, 8, 64)}, "sequence 64 is beyond the 32 positions"),
    ],
)
def test_sizes_that_do_not_fit(sizes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(KiloDeltaError, match=reason):
        cached_template(open_model(pico.llama(tmp_path / "base")), sizes=sizes)


def test_an_empty_cache_is_a_shape_and_an_empty_batch_is_none() -> None:
    port = Port(name="past", dtype="float32", shape=("batch", 2, "past_sequence", 4))
    assert misfit(((1, 2, 0, 4), (1, 2, 8, 4), (8, 2, 16, 4)), port) == ""
    assert "rise from 1" in misfit(((0, 2, 0, 4), (1, 2, 8, 4), (8, 2, 16, 4)), port)
