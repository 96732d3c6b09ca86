"""GGUF adapters: llama.cpp itself, on a tiny model of ours, gives the merged model's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kilodelta.errors import BaseMismatchError, ExportError, InputError, OutputError
from kilodelta.export.gguf import export_gguf
from kilodelta.export.merge.checkpoint import merge
from kilodelta.format.methods import Lora, Method, Nola, RandLora
from kilodelta.format.targets import Patterns
from tests.support import making, pico

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")

VOCABULARY, WIDTH, LAYERS, HEADS, KEYS, HEAD = 96, 64, 2, 4, 2, 16
EVERY = Patterns(include=("model.layers.*_proj.weight",))
PROMPT = [1, 5, 9, 20, 33]


def llama(folder: Path, kind: str = "llama") -> Path:
    """A llama of 64 x 2 layers whose every number is random, saved as a Hugging Face folder."""
    import transformers

    torch.manual_seed(0)
    options: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEYS,
        "head_dim": HEAD,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    name = {"llama": "Llama", "qwen3": "Qwen3"}[kind]
    config = getattr(transformers, f"{name}Config")(**options)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise * 0.15 if parameter.ndim == 2 else 1 + 0.1 * noise)
    model.save_pretrained(folder)
    return folder


def base_gguf(folder: Path, out: Path, kind: str = "llama") -> Path:
    """The same model as llama.cpp's own file, by the writer's documented fields."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    writer = gguf.GGUFWriter(out, kind)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(float(model.config.rope_parameters["rope_theta"]))
    writer.add_rope_dimension_count(HEAD)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(0)
    writer.add_tokenizer_model("llama")
    words = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(VOCABULARY - 3)]
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([2, 3, 3] + [6] * (VOCABULARY - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    arch = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen3": gguf.MODEL_ARCH.QWEN3}[kind]
    names = gguf.get_tensor_name_map(arch, LAYERS)
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        for part, heads in (("q_proj", HEADS), ("k_proj", KEYS)):
            if part in name and kind == "llama":
                half = len(values) // heads // 2
                values = values.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(values.shape)
        place = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(place, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def log_probabilities(model: Path, adapter: Path | None) -> np.ndarray[Any, Any]:
    """Of the token after the prompt, computed by llama.cpp."""
    llama_cpp = pytest.importorskip("xllamacpp")
    params = llama_cpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx = 128
    params.warmup = False
    params.cpuparams.n_threads = 1
    if adapter is not None:
        params.lora_adapters = [llama_cpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = llama_cpp.Server(params)
    asked = {"prompt": PROMPT, "n_predict": 1, "n_probs": VOCABULARY, "temperature": -1}
    answer = server.handle_completions({**asked, "cache_prompt": False})
    found = np.full(VOCABULARY, -np.inf)
    for token in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        found[token["id"]] = token["logprob"]
    return found


def expected(folder: Path) -> np.ndarray[Any, Any]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).double()
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0, -1]
    values: np.ndarray[Any, Any] = torch.log_softmax(logits, -1).numpy()
    return values


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("method", [Lora(rank=4), Nola(rank=3, bases=64)])
def test_llama_cpp_computes_the_merged_model(kind: str, method: Method, tmp_path: Path) -> None:
    base = llama(tmp_path / "base", kind)
    tune = making.delta(base, method, patterns=EVERY)
    tune.save(tmp_path / "task.kd")
    made = export_gguf(base, tmp_path / "task.kd", tmp_path / "lora.gguf")
    assert made.targets == 7 * LAYERS
    assert made.error < 1e-6
    merge(base, tmp_path / "task.kd", tmp_path / "merged")
    plain = base_gguf(base, tmp_path / "base.gguf", kind)
    before = expected(base)
    after = expected(tmp_path / "merged")
    found = log_probabilities(plain, made.path)
    effect = np.abs(after - before).max()
    assert effect > 0.1
    assert np.abs(log_probabilities(plain, None) - before).max() < 2e-2 * effect
    assert np.abs(found - after).max() < 2e-2 * effect


def test_the_file_says_what_llama_cpp_asks_for(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    tune = making.delta(base, Lora(rank=4), patterns=EVERY)
    tune.save(tmp_path / "task.kd")
    made = export_gguf(base, tmp_path / "task.kd", tmp_path / "lora.gguf", dtype="float16")
    reader = gguf.GGUFReader(made.path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == made.rank
    assert fields["kilodelta.base"] == tune.manifest.base.root
    shapes = {t.name: tuple(reversed(t.shape.tolist())) for t in reader.tensors}
    assert shapes["blk.0.attn_k.weight.lora_a"] == (made.rank, WIDTH)
    assert shapes["blk.0.attn_k.weight.lora_b"] == (KEYS * HEAD, made.rank)
    with pytest.raises(OutputError, match="exists already"):
        export_gguf(base, tmp_path / "task.kd", made.path)
    first = made.path.read_bytes()
    export_gguf(base, tmp_path / "task.kd", made.path, dtype="float16", force=True)
    assert made.path.read_bytes() == first


def test_what_has_no_place_is_refused_by_name(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    for pattern, words in (
        ("model.embed_tokens.weight", r"model\.embed_tokens\.weight has no place"),
        ("lm_head.weight", r"lm_head\.weight has no place"),
    ):
        odd = making.delta(base, Lora(rank=2), patterns=Patterns(include=(pattern,)))
        with pytest.raises(ExportError, match=words):
            export_gguf(base, odd, tmp_path / "x.gguf")
    full = making.delta(base, RandLora(rank=16), patterns=EVERY)
    with pytest.raises(ExportError, match="full rank"):
        export_gguf(base, full, tmp_path / "x.gguf")
    assert 0 < export_gguf(base, full, tmp_path / "x.gguf", svd=4).error < 1
    other = pico.gpt2(tmp_path / "gpt2")
    conv = Patterns(include=("*c_fc.weight",))
    with pytest.raises(ExportError, match="'gpt2' is not exported"):
        export_gguf(other, making.delta(other, Lora(rank=1), patterns=conv), tmp_path / "y.gguf")
    with pytest.raises(BaseMismatchError):
        export_gguf(llama(tmp_path / "second", "qwen3"), full, tmp_path / "y.gguf")
    with pytest.raises(InputError, match="int8"):
        export_gguf(base, full, tmp_path / "y.gguf", dtype="int8")
    assert not (tmp_path / "y.gguf").exists()
