"""Encoder-decoders: an encoder's and a decoder's graph, and the texts that both write together."""

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
from kilodelta.errors import ExportError, InputError
from kilodelta.export import export
from kilodelta.export.decoder.genai import CONFIG
from kilodelta.export.manifest import artefacts
from kilodelta.export.manifest.facts import Artefact, FileFact, Port
from kilodelta.export.merged_model import merged_weights, open_merged
from kilodelta.export.onnx.save import save
from kilodelta.export.onnx.template import fill_template
from kilodelta.export.seq2seq.genai import why_no_genai
from kilodelta.export.seq2seq.halves import half_templates
from kilodelta.export.seq2seq.trial import try_halves
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.file import load
from kilodelta.format.methods import Lora
from kilodelta.models import open_model
from kilodelta.models.generation.cache import PAST, PRESENT
from kilodelta.models.generation.seq2seq import (
    ENCODED,
    ENCODER_MASK,
    DecoderHalf,
    EncoderHalf,
    empty_own,
    is_seq2seq,
    measure,
    source_example,
)
from kilodelta.models.generation.source_prompts import read_sources, text_prefix
from kilodelta.models.generation.special_tokens import special_tokens
from kilodelta.verify import verify
from kilodelta.verify.generation.compare import TEXT
from kilodelta.verify.generation.halves_writer import HalvesWriter
from kilodelta.verify.generation.writers import GenaiWriter, Written
from kilodelta.verify.parity.halves import joined
from tests.support import pico, seq2seq

pytest.importorskip("onnxruntime")

MOST = 9
MODELS = ("t5", "whisper", "bart", "marian", "captioner")


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


def fine_tune(base: Path, folder: Path, *, cached: bool, dtype: str = "fp32") -> Case:
    """A large change of a base in a file, and the export."""
    tuned = pico.tuned(base, folder / "tuned", size=0.3)
    delta = folder / "task.kd"
    compress(base, tuned, delta, options=Options(method=Lora(rank=4)))
    export(base, delta, folder / "out", kv_cache=cached, dtype=[dtype])
    return Case(base=base, delta=delta, out=folder / "out")


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("t5")
    return fine_tune(seq2seq.t5(folder / "base"), folder, cached=True)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("whisper")
    return fine_tune(seq2seq.whisper(folder / "base"), folder, cached=False)


def greedy(model: Any, source: dict[str, torch.Tensor], ids: Sequence[int]) -> list[int]:
    """What transformers itself writes of a row, an end token included."""
    written = model.module.generate(
        **source,
        decoder_input_ids=torch.tensor([list(ids)]),
        max_new_tokens=MOST,
        do_sample=False,
        num_beams=1,
        use_cache=True,
    )[0].tolist()
    # Whisper's own generate leaves the start token out of what it returns.
    start = len(ids) if written[: len(ids)] == list(ids) else 0
    return [int(n) for n in written[start:]][:MOST]


def sources(model: Any) -> list[dict[str, torch.Tensor]]:
    """Rows of several lengths, where the encoder reads texts."""
    return [source_example(model, rows=1, tokens=n) for n in (7, 1, 12)]


def check_texts(model: Any, base: Any, writer: HalvesWriter) -> None:
    """ONNX Runtime writes what transformers writes."""
    end = special_tokens(model, Path(base.source)).end
    ids = text_prefix(model, end)
    assert writer.available() is None
    written = [list(writer.write(ids, MOST, end, row).chosen) for row in sources(model)]
    assert written == [greedy(model, row, ids) for row in sources(model)]
    assert written != [greedy(base, row, ids) for row in sources(base)]


def writer(case: Case) -> HalvesWriter:
    made = artefacts.read(case.out).artefacts
    return HalvesWriter(case.out / made[0].file, case.out / made[1].file)


def test_a_cache_has_names_and_axes(t5: Case) -> None:
    encoder, decoder = artefacts.read(t5.out).artefacts
    assert (encoder.file, decoder.file) == (
        "encoder_model.fp32.onnx",
        "decoder_with_past_model.fp32.onnx",
    )
    cross, own = ("batch", 2, "encoder_sequence", 8), ("batch", 2, "past_sequence", 8)
    assert {port.name: port.shape for port in encoder.inputs} == {
        "input_ids": ("batch", "encoder_sequence"),
        "attention_mask": ("batch", "encoder_sequence"),
    }
    assert {port.name: port.shape for port in encoder.outputs} == {
        "encoder_hidden_states": ("batch", "encoder_sequence", 16),
        "present.0.encoder.key": cross,
        "present.0.encoder.value": cross,
    }
    assert {port.name: port.shape for port in decoder.inputs} == {
        "decoder_input_ids": ("batch", "decoder_sequence"),
        "encoder_attention_mask": ("batch", "encoder_sequence"),
        "past_key_values.0.encoder.key": cross,
        "past_key_values.0.encoder.value": cross,
        "past_key_values.0.decoder.key": own,
        "past_key_values.0.decoder.value": own,
    }
    assert [port.name for port in decoder.outputs] == [
        "logits",
        "present.0.decoder.key",
        "present.0.decoder.value",
    ]
    # A text begins with an empty cache.
    assert decoder.profile["past_key_values.0.decoder.key"][0] == (1, 2, 0, 8)
    assert not (t5.out / CONFIG).exists()


def test_why_genai_does_not_run_others(tmp_path: Path) -> None:
    whisper = open_model(seq2seq.whisper(tmp_path / "whisper"))

    def heard(frames: int) -> tuple[Port, ...]:
        return (Port(name="input_features", dtype="float32", shape=("batch", 80, frames)),)

    assert "3000 frames, and this one hears 100" in str(why_no_genai(whisper, heard(100)))
    assert why_no_genai(whisper, heard(3000)) is None
    t5 = open_model(seq2seq.t5(tmp_path / "t5"))
    assert why_no_genai(t5, ()) == "no genai_config.json: ONNX Runtime GenAI knows no t5"


@pytest.mark.slow
def test_without_a_cache_the_decoder_takes_what_the_encoder_puts_out(whisper: Case) -> None:
    encoder, decoder = artefacts.read(whisper.out).artefacts
    assert decoder.file == "decoder_model.fp32.onnx"
    assert {port.name: port.shape for port in encoder.inputs} == {
        "input_features": ("batch", 8, 100)
    }
    assert {port.name: port.shape for port in decoder.inputs} == {
        "decoder_input_ids": ("batch", "decoder_sequence"),
        "encoder_hidden_states": ("batch", 50, 16),
    }


@pytest.mark.parametrize("name", ["t5", pytest.param("whisper", marks=pytest.mark.slow)])
def test_onnx_runtime_writes_what_transformers_writes(
    name: str, request: pytest.FixtureRequest
) -> None:
    case = request.getfixturevalue(name)
    check_texts(case.merged(), open_model(case.base), writer(case))


def test_verify_generates_of_texts(t5: Case, tmp_path: Path) -> None:
    inputs = tmp_path / "pairs.jsonl"
    inputs.write_text(
        '{"text": "a river runs", "target": "rain"}\n{"text": "birds", "target": "a"}\n'
    )
    done = verify(t5.base, t5.delta, [t5.out], inputs=inputs, generate=4)
    assert done.failure is None
    assert done.report is not None
    (result,) = done.report.results
    assert result.artefact == "encoder_model.fp32.onnx + decoder_with_past_model.fp32.onnx"
    assert {check.output for check in result.checks} == {"logits", TEXT}
    assert result.update["logits"] == pytest.approx(1, abs=1e-3)
    with pytest.raises(InputError, match="has a cache, so it is compared by what it writes"):
        verify(t5.base, t5.delta, [t5.out], inputs=inputs)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_genai_writes_what_transformers_writes_of_a_sound(dtype: str, tmp_path: Path) -> None:
    """ONNX Runtime GenAI itself, over several steps; it feeds a Whisper 3000 frames."""
    pytest.importorskip("onnxruntime_genai")
    base = seq2seq.whisper(tmp_path / "base", layers=2, seconds=30)
    case = fine_tune(base, tmp_path, cached=True, dtype=dtype)
    encoder, decoder = artefacts.read(case.out).artefacts
    config = json.loads((case.out / CONFIG).read_text())
    assert [config["model"][half]["filename"] for half in ("encoder", "decoder")] == [
        encoder.file,
        decoder.file,
    ]
    assert CONFIG in {file.file for file in decoder.files}
    model = case.merged()
    ids = text_prefix(model, special_tokens(model, base).end)
    row = source_example(model, rows=1, tokens=1)
    if dtype == "fp32":
        written = GenaiWriter(case.out)
        assert written.available() is None
        text = written.write(ids, MOST, (3,), row)
        assert list(text.chosen) == greedy(model, row, ids)
        assert len(text.chosen) > 2
        assert list(text.chosen) != greedy(open_model(base), row, ids)
        with torch.no_grad():
            whole = model.module(**row, decoder_input_ids=torch.tensor([text.fed])).logits[0]
        np.testing.assert_allclose(text.logits, whole.numpy(), atol=1e-4)
    np.savez(
        tmp_path / "in.npz",
        input_features=row["input_features"].numpy(),
        decoder_input_ids=np.array([[4, 5]]),
    )
    done = verify(base, case.delta, [case.out], inputs=tmp_path / "in.npz", generate=4)
    assert done.failure is None
    assert done.report is not None
    runners = {result.runner: result.error for result in done.report.results}
    assert runners == {"onnxruntime-cpu": None, "onnxruntime-genai": None}


@pytest.mark.slow
def test_verify_compares_both_halves(whisper: Case, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((3, 8, 100), dtype=np.float32)
    ids = rng.integers(4, pico.VOCABULARY, (3, 6))
    np.savez(tmp_path / "in.npz", input_features=features, decoder_input_ids=ids)
    done = verify(whisper.base, whisper.delta, [whisper.out], inputs=tmp_path / "in.npz")
    assert done.failure is None
    assert done.report is not None
    result = next(r for r in done.report.results if r.runner == "onnxruntime-cpu")
    assert {check.output for check in result.checks} == {"logits", "encoder_last_hidden_state"}
    again = verify(
        whisper.base, whisper.delta, [whisper.out], inputs=tmp_path / "in.npz", generate=4
    )
    assert again.failure is None


def artefact(file: str, dtype: Any, inputs: Sequence[str], outputs: Sequence[str]) -> Artefact:
    """One file as a manifest has it; every port is a row of two numbers."""
    ports = [
        tuple(Port(name=name, dtype="float32", shape=("batch", 2)) for name in names)
        for names in (inputs, outputs)
    ]
    return Artefact(
        kind="onnx",
        dtype=dtype,
        files=(FileFact(file=file, sha256="", nbytes=1),),
        inputs=ports[0],
        outputs=ports[1],
        profile={name: ((1, 2), (1, 2), (8, 2)) for name in inputs},
    )


def test_halves_of_one_precision_are_one_model() -> None:
    ids, hidden = "decoder_input_ids", ENCODED
    made = [
        artefact(f"{name}.{dtype}.onnx", dtype, inputs, outputs)
        for dtype in ("float32", "float16")
        for name, inputs, outputs in (
            ("encoder", ["input_features"], [hidden]),
            ("decoder", [ids, hidden], ["logits"]),
        )
    ]
    pairs = joined(made)
    assert [pair.file for pair in pairs] == [
        "encoder.float32.onnx + decoder.float32.onnx",
        "encoder.float16.onnx + decoder.float16.onnx",
    ]
    assert list(pairs[0].profile) == ["input_features", ids]
    assert [port.name for port in pairs[0].outputs] == ["logits", "encoder_last_hidden_state"]
    # One half alone, or a model that is none of both, stays what it is.
    other = artefact("model.onnx", "float32", ["input_ids"], ["logits"])
    for alone in (made[:1], made[1:2], [other], [made[0], made[3]]):
        assert joined(alone) == tuple(alone)


def test_a_token_that_the_model_would_not_choose_fails(
    t5: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("a river runs\n")
    write = HalvesWriter.write

    def wrong(self: HalvesWriter, *given: Any) -> Written:
        text = write(self, *given)
        last = (text.chosen[-1] + 1) % pico.VOCABULARY
        return dataclasses.replace(text, chosen=(*text.chosen[:-1], last))

    monkeypatch.setattr(HalvesWriter, "write", wrong)
    done = verify(t5.base, t5.delta, [t5.out], inputs=tmp_path / "a.txt", generate=3)
    assert done.failure is not None
    assert "greedy text at the text 1" in done.failure.what


class Swapped:
    """A session that mixes keys up with values, which have one shape."""

    def __init__(self, session: Any, kind: str) -> None:
        self.session, self.kind = session, kind

    def get_inputs(self) -> Any:
        return self.session.get_inputs()

    def get_outputs(self) -> Any:
        return self.session.get_outputs()

    def run(self, names: Any, fed: dict[str, Any]) -> Any:
        a, b = (f"past_key_values.0.{self.kind}.{part}" for part in ("key", "value"))
        return self.session.run(names, {**fed, a: fed[b], b: fed[a]})


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_cache_that_is_mixed_up_is_noticed(kind: str, t5: Case) -> None:
    import onnxruntime

    merged = t5.merged()
    encoder, decoder = (
        onnxruntime.InferenceSession(t5.out / made.file)
        for made in artefacts.read(t5.out).artefacts
    )
    halves = measure(merged, source_example(merged, rows=1, tokens=3))
    try_halves(encoder, decoder, merged, halves, "float32")
    with pytest.raises(ExportError, match=r"logits are off by .*, relative"):
        try_halves(encoder, Swapped(decoder, kind), merged, halves, "float32")


def test_a_mask_that_is_lost_is_noticed(t5: Case) -> None:
    import onnxruntime

    class Unmasked(Swapped):
        def run(self, names: Any, fed: dict[str, Any]) -> Any:
            mask = np.ones_like(fed["encoder_attention_mask"])
            return self.session.run(names, {**fed, "encoder_attention_mask": mask})

    merged = t5.merged()
    encoder, decoder = (
        onnxruntime.InferenceSession(t5.out / made.file)
        for made in artefacts.read(t5.out).artefacts
    )
    halves = measure(merged, source_example(merged, rows=1, tokens=3))
    with pytest.raises(ExportError, match=r"logits are off by .*, relative"):
        try_halves(encoder, Unmasked(decoder, ""), merged, halves, "float32")


def test_what_a_text_begins_with(tmp_path: Path) -> None:
    """The start token, then what the tokenizer puts before a text; a target is not looked at."""
    loaded = open_model(seq2seq.t5(tmp_path / "base"))
    assert text_prefix(loaded, (3,)) == (0, 2)
    spec = tmp_path / "pairs.jsonl"
    lines = ({"text": "birds watch", "target": "rain"}, {"text": "rain", "target": "a"})
    spec.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts = read_sources(spec, loaded, end=(3,))
    assert [prompt.ids for prompt in prompts] == [(0, 2), (0, 2)]
    assert [prompt.source["input_ids"].shape for prompt in prompts] == [(1, 4), (1, 3)]
    spec.write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    with pytest.raises(InputError, match="holds conversations"):
        read_sources(spec, loaded, end=(3,))


def test_texts_for_an_encoder_that_hears_are_named(tmp_path: Path) -> None:
    """Not said by ONNX Runtime, after a merge, with the advice to export again."""
    loaded = open_model(seq2seq.whisper(tmp_path / "base"))
    spec = tmp_path / "texts.txt"
    spec.write_text("rain\n")
    with pytest.raises(InputError, match=r"texts\.txt:1 makes .*, and .* wants input_features"):
        read_sources(spec, loaded, end=(3,))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"outputs": ["logits"]}, "whose outputs cannot be chosen"),
        ({"triton": "models"}, "Triton would serve each alone"),
        ({"profile": ["sequence=1,2,3"]}, "have no axis sequence to size"),
        ({"profile": ["decoder_sequence=1,2,300"]}, "300 is beyond the 32 positions"),
    ],
)
def test_options_that_two_graphs_do_not_take(
    options: dict[str, Any], reason: str, t5: Case, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=reason):
        export(t5.base, t5.delta, tmp_path / "out", **options)


def test_what_writes_no_texts_is_no_such_model(tmp_path: Path) -> None:
    """A decoder, an encoder, and an encoder-decoder without a head."""
    from transformers import T5Config, T5Model

    config = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    pico.save(lambda: T5Model(config), tmp_path / "bare")
    for folder in (pico.llama(tmp_path / "a"), pico.bert(tmp_path / "b"), tmp_path / "bare"):
        assert not is_seq2seq(open_model(folder))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_both_halves_are_the_model(name: str, tmp_path: Path) -> None:
    """Without a graph: encoder and decoder apart, and the decoder in pieces, against the whole."""
    loaded = open_model(getattr(seq2seq, name)(tmp_path / "base"))
    assert is_seq2seq(loaded)
    source = source_example(loaded, rows=2, tokens=7)
    halves = measure(loaded, source)
    masks = {}
    if halves.reads_text:
        source["attention_mask"][1, 4:] = 0
        masks[ENCODER_MASK] = source["attention_mask"]
    ids = torch.randint(pico.VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
    expected = loaded.module(**source, decoder_input_ids=ids).logits
    encoded = EncoderHalf(loaded.module, cached=True)(**source)
    decoder = DecoderHalf(loaded.module, width=halves.width)
    whole = decoder(decoder_input_ids=ids, encoder_hidden_states=encoded[ENCODED], **masks)
    torch.testing.assert_close(whole["logits"], expected)
    cross = {n.replace(PRESENT, PAST): t for n, t in encoded.items() if n != ENCODED}
    own, logits = empty_own(halves, 2), []
    for start, end in ((0, 3), (3, 4), (4, 6)):
        made = decoder(decoder_input_ids=ids[:, start:end], **masks, **cross, **own)
        logits.append(made.pop("logits"))
        own = {n.replace(PRESENT, PAST): t for n, t in made.items()}
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_graphs_are_filled_with_another_fine_tune(name: str, cached: bool, tmp_path: Path) -> None:
    """Graphs of the base with the weights of a tuned copy write what that copy writes."""
    base = getattr(seq2seq, name)(tmp_path / "base")
    tuned = pico.tuned(base, tmp_path / "tuned", size=0.3)
    graphs = half_templates(open_model(base), cached=cached)
    paths = []
    for stem, template in graphs.items():
        paths.append(tmp_path / f"{stem}.onnx")
        save(fill_template(template, tuned), paths[-1])
    check_texts(open_model(tuned), open_model(base), HalvesWriter(*paths))
