"""Opening Hugging Face folders: strangers' files, kinds of models, limits, names by proof."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from safetensors.numpy import save_file
from torch import nn

from kilodelta.errors import CheckpointError, InputError, KiloDeltaError
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.models import example, open_model, outputs
from kilodelta.models.quantised import evidence
from kilodelta.models.weights import tensor
from tests.support import pico

TINY: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
T5 = {"vocab_size": 48, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 8,
}


def saved(model: Any, folder: Path) -> Path:
    transformers.logging.disable_progress_bar()
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return pico.bert(tmp_path / "base")


def edit(folder: Path, **changes: Any) -> None:
    place = folder / "config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **changes}))


def test_python_code_of_a_folder_is_neither_run_nor_offered(
    bert: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = bert / "ran"
    (bert / "own.py").write_text(
        f"from transformers import PretrainedConfig\nopen({str(ran)!r}, 'w')\n"
        "class C(PretrainedConfig): pass\n"
    )
    edit(bert, auto_map={"AutoConfig": "own.C"}, model_type="unknown-x")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    with pytest.raises(InputError, match=r"names Python code of the folder \(own\.C\)"):
        open_model(bert)
    assert not ran.exists()
    assert "[y/N]" not in "".join(capsys.readouterr())


def test_known_architectures_open_without_their_folders_code(bert: Path) -> None:
    """Many folders carry the code that transformers has taken over."""
    edit(bert, auto_map={"AutoConfig": "own.C"})
    assert type(open_model(bert).module).__name__ == "BertModel"


def test_a_tokenizers_code_is_not_run(bert: Path) -> None:
    place = bert / "tokenizer_config.json"
    settings = json.loads(place.read_text())
    own = {"auto_map": {"AutoTokenizer": ["own.T", None]}, "tokenizer_class": "T"}
    place.write_text(json.dumps({**settings, **own}))
    (bert / "own.py").write_text(f"open({str(bert / 'ran')!r}, 'w')\n")
    with contextlib.suppress(InputError):
        open_model(bert)
    assert not (bert / "ran").exists()


@pytest.mark.parametrize(
    ("file", "text", "what"),
    [
        ("modules.json", "[1,2]", r"it\[0\] is not an object"),
        ("modules.json", "[" * 100_000, "nested too deeply"),
        ("modules.json", "[]", "chains nothing"),
        ("modules.json", "{}", "it is not a list"),
        ("modules.json", '[{"type": 3}]', r"it\[0\]\.type is not a text"),
        ("modules.json", '[{"type": "a.Transformer", "path": "../x"}]', "not a file name"),
        (
            "modules.json",
            '[{"type": "a.Transformer"}, {"type": "a.Pooling", "path": "' + 300 * "x" + '"}]',
            "longer than any file name",
        ),
        ("config.json", "[]", "holds no JSON object"),
        ("config.json", "[" * 100_000, "is not understood"),
        ("config.json", "\xff", "is not understood"),
        ("tokenizer_config.json", "[]", "the tokenizer cannot be opened"),
        ("tokenizer.json", "{}", "the tokenizer cannot be opened"),
    ],
)
def test_strange_settings_are_refused_by_name(bert: Path, file: str, text: str, what: str) -> None:
    (bert / file).write_text(text, encoding="latin-1")
    with pytest.raises(KiloDeltaError, match=what):
        open_model(bert)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_probs_dropout_prob": True},
        {"hidden_size": -16},
        {"hidden_size": "x"},
        {"num_attention_heads": 3},
        {"model_type": "nothing"},
        {"model_type": 3},
        {"architectures": ["NoSuchModel"]},
        {"architectures": [3]},
        {"architectures": ["logging"]},
        {"vocab_size": 0},
        {"hidden_act": "nothing"},
    ],
    ids=str,
)
def test_a_strange_configuration_is_a_sentence(bert: Path, changes: dict[str, Any]) -> None:
    edit(bert, **changes)
    with pytest.raises(KiloDeltaError) as error:
        open_model(bert)
    assert str(bert) in error.value.what or "transformers" in error.value.what


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_pipes_and_links_are_not_opened(bert: Path, name: str, tmp_path: Path) -> None:
    (bert / name).unlink(missing_ok=True)
    os.mkfifo(bert / name)
    with pytest.raises(CheckpointError, match="is a pipe"):
        open_model(bert)
    (bert / name).unlink()
    (tmp_path / "secret").write_text("{}")
    (bert / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="is a link"):
        open_model(bert)


def test_a_pooling_without_settings_is_named(tmp_path: Path) -> None:
    folder = pico.sentence_bert(tmp_path / "base")
    (folder / "1_Pooling" / "config.json").unlink()
    (folder / "1_Pooling").rmdir()
    with pytest.raises(
        InputError, match=r"names 1_Pooling, but .*1_Pooling/config\.json is missing"
    ):
        open_model(folder)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"pooling_mode": "max"}, "pools by max"),
        ({"pooling_mode_max_tokens": True, "pooling_mode_cls_token": True}, r"pools by cls\+max"),
        ({}, "pools by nothing"),
    ],
)
def test_other_poolings_are_named(tmp_path: Path, settings: dict[str, Any], what: str) -> None:
    folder = pico.sentence_bert(tmp_path / "base")
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=what):
        open_model(folder)


def test_a_cache_folder_of_the_hub_opens(tmp_path: Path) -> None:
    """As huggingface_hub lays it out: files are links into `blobs`."""
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / ("a" * 40)
    (cache / "blobs").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("a" * 40)
    pico.bert(tmp_path / "base")
    snapshot.mkdir(parents=True)
    for file in (tmp_path / "base").iterdir():
        file.rename(cache / "blobs" / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert open_model(cache).max_length == pico.POSITIONS


def test_roberta_counts_positions_from_its_padding_index_on(tmp_path: Path) -> None:
    """32 rows, of which two are never reached; a 31st token would be out of the table."""
    config = transformers.RobertaConfig(**TINY, pad_token_id=1)
    loaded = open_model(saved(transformers.RobertaModel(config), tmp_path / "base"))
    assert loaded.max_length == 30
    ids = torch.full((1, 31), 5)
    outputs(loaded, {"input_ids": ids[:, :30]})
    with pytest.raises((IndexError, RuntimeError), match="index"):
        outputs(loaded, {"input_ids": ids})


def whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=48, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=8,
        max_source_positions=10, max_target_positions=20, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def clip() -> Any:
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=TINY, vision_config=VISION, projection_dim=8)
    )


MODELS: list[tuple[Callable[[], Any], str, tuple[str, ...], int | None]] = [
    (lambda: transformers.BertModel(transformers.BertConfig(**TINY)), "text",
     ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"), 32),
    (lambda: transformers.ViTModel(transformers.ViTConfig(**VISION)), "image", ("pixel_values",),
     None),
    (clip, "any", ("input_ids", "pixel_values", "attention_mask"), 32),
    (whisper, "any", ("input_features", "decoder_input_ids"), 20),
    (lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)), "any",
     ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"), None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "kind", "inputs", "length"), MODELS, ids=["bert", "vit", "clip", "whisper", "t5"]
)
def test_models_open_with_all_their_inputs(
    make: Callable[[], Any], kind: str, inputs: tuple[str, ...], length: int | None, tmp_path: Path
) -> None:
    """Encoder-decoders and models of several inputs open; labels and caches are no inputs."""
    loaded = open_model(saved(make(), tmp_path / "base"))
    assert (loaded.kind, loaded.max_length) == (kind, length)
    assert set(inputs) <= set(loaded.accepts)
    assert not {"labels", "past_key_values", "use_cache", "return_loss"} & set(loaded.accepts)
    assert loaded.required == (str(loaded.module.main_input_name),)


@pytest.mark.parametrize("make", [clip, whisper], ids=["clip", "whisper"])
def test_inputs_that_only_the_user_knows_are_asked_for(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    loaded = open_model(saved(make(), tmp_path / "base"))
    with pytest.raises(InputError, match="does not say what its inputs look like; it takes"):
        example(loaded)


def test_detr_like_models_take_one_input(tmp_path: Path) -> None:
    """Their configuration says encoder-decoder; YOLOS stands for DETR, which needs timm."""
    config = transformers.YolosConfig(
        **{**VISION, "image_size": [16, 16]}, num_detection_tokens=5, num_labels=3
    )
    folder = saved(transformers.YolosForObjectDetection(config), tmp_path / "base")
    edit(folder, is_encoder_decoder=True)
    loaded = open_model(folder)
    assert loaded.kind == "image"
    assert {"logits", "pred_boxes"} <= set(outputs(loaded, example(loaded)))


@pytest.mark.parametrize(
    ("name", "array", "what"),
    [
        ("l.qweight", np.zeros((2, 2), np.int32), "GPTQ or AWQ"),
        ("l.weight_packed", np.zeros((2, 2), np.int32), "compressed-tensors"),
        ("l.weight.absmax", np.zeros(2, np.float32), "bitsandbytes 4 bit"),
        ("l.SCB", np.zeros(2, np.float32), "bitsandbytes INT8"),
        ("l.weight_scale_inv", np.zeros(2, np.float32), "fine-grained FP8"),
    ],
)
def test_packed_weights_are_recognised(bert: Path, name: str, array: Any, what: str) -> None:
    save_file({name: array, "x": np.zeros(2, np.float32)}, bert / "model.safetensors")
    with pytest.raises(InputError, match=f"holds a quantised model: {name} is {what}"):
        open_model(bert)


def test_float64_is_no_quantised_type(tmp_path: Path) -> None:
    save_file({"x": np.zeros(2, np.float64)}, tmp_path / "model.safetensors")
    assert evidence(Checkpoint.open(tmp_path)) is None


def test_settings_of_a_quantiser_are_recognised(bert: Path) -> None:
    (bert / "hf_quant_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"quantised model: it has a hf_quant_config\.json"):
        open_model(bert)
    (bert / "hf_quant_config.json").unlink()
    edit(bert, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(InputError, match=r"config\.json has a quantization_config"):
        open_model(bert)


def test_empty_tensors_are_read(tmp_path: Path) -> None:
    """DINOv3 without registers holds one of shape (1, 0, width)."""
    save_file({"e": np.zeros((1, 0, 4), np.float16)}, tmp_path / "m.safetensors")
    found = tensor(Checkpoint.open(tmp_path / "m.safetensors"), "e")
    assert (found.shape, found.dtype) == ((1, 0, 4), torch.float16)


def test_a_module_of_a_transformers_class_finds_renamed_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head's prefix differs: `encoder...` in the bare model's files, `bert.encoder...` here."""
    base = pico.bert(tmp_path / "base")
    (tmp_path / "own.py").write_text(
        "import transformers\n"
        f"config = transformers.BertConfig(**{pico._bert_options()!r}, num_labels=3)\n"
        "def make():\n    return transformers.BertForSequenceClassification(config)\n"
    )
    monkeypatch.chdir(tmp_path)
    loaded = open_model("own:make", weights=base)
    assert loaded.names["embeddings.word_embeddings.weight"] == (
        "bert.embeddings.word_embeddings.weight"
    )
    assert loaded.missing == ("classifier.weight", "classifier.bias")
    held = tensor(Checkpoint.open(base), "pooler.dense.weight")
    assert torch.equal(loaded.module.state_dict()["bert.pooler.dense.weight"], held)


def test_a_model_of_more_words_opens_with_tied_weights_of_fewer(tmp_path: Path) -> None:
    base, more = pico.llama(tmp_path / "base"), pico.llama(tmp_path / "more")
    config = json.loads((more / "config.json").read_text())
    (more / "config.json").write_text(json.dumps({**config, "vocab_size": pico.VOCABULARY + 3}))
    loaded = open_model(more, weights=base)  # a fine-tune that added tokens, over its base
    assert loaded.missing == ("model.embed_tokens.weight", "lm_head.weight")
    assert loaded.unused == ("model.embed_tokens.weight",)


def test_a_module_of_other_names_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"x": np.zeros(2, np.float32)}, tmp_path / "m.safetensors")
    (tmp_path / "other.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Linear(2, 2)\ndef number():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="holds none of the module's tensors"):
        open_model("other:make", weights=tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="other:number returned a int"):
        open_model("other:number")
    assert isinstance(open_model("other:make").module, nn.Linear)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"intermediate_size": 600_000}, r"asks for \d+ parameters"),
        ({"vocab_size": 10**9}, r"asks for \d+ parameters"),
        ({"num_hidden_layers": 10**6}, "asks for 1000000 layers of 1 experts"),
    ],
)
def test_a_configuration_far_larger_than_its_weights_is_refused(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    base = pico.bert(tmp_path / "base", layers=1)
    place = base / "config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **change}))
    with pytest.raises(CheckpointError, match=said):
        open_model(base)
