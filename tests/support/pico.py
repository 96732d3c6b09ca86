"""Pico models, built on the spot: real Hugging Face folders of a few kilobytes, no download.

Every tensor is random, those included that a fresh model leaves at zero or one (norms, biases,
running statistics), so that a mixed-up name shows in the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

WORDS = (
    "a river runs past the old mill and its quiet garden while seven birds watch from "
    "every roof who would sing there all night long if rain came down"
)
"""The pico tokenizer's words."""

TEXTS = (
    "a river runs past the old mill",
    "seven birds watch from every roof",
    "who would sing there all night long",
    "rain",
    "the quiet garden and the old mill watch rain",
)

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
VOCABULARY = 48
POSITIONS = 32
WIDTH = 16
LABELS = 3
IMAGE = 16


def bert(
    folder: Path, *, seed: int = 0, width: int = WIDTH, layers: int = 2, inner: int = 24
) -> Path:
    """An encoder with a pooler, which puts out `pooler_output`, and a tokenizer."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": inner}
    config = BertConfig(**{**_bert_options(), **sizes})
    return save(lambda: BertModel(config), folder, seed, tokens=True)


def bert_classifier(folder: Path, *, seed: int = 0, labels: int = LABELS) -> Path:
    """The same encoder with a classifier on its pooler, and a tokenizer."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(**_bert_options(), num_labels=labels)
    return save(lambda: BertForSequenceClassification(config), folder, seed, tokens=True)


def gpt2(folder: Path, *, seed: int = 0) -> Path:
    """A decoder with Conv1D layers, whose output embedding is tied to the input's."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=POSITIONS,
        n_embd=WIDTH,
        n_layer=2,
        n_head=2,
        bos_token_id=2,
        eos_token_id=3,
    )
    return save(lambda: GPT2LMHeadModel(config), folder, seed, tokens=True)


def llama(folder: Path, *, seed: int = 0, tied: bool = True) -> Path:
    """A decoder with RMS norms, rotary positions, grouped heads and a gated MLP."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=tied,
        bos_token_id=2,
        eos_token_id=3,
    )
    return save(lambda: LlamaForCausalLM(config), folder, seed, tokens=True)


def qwen2(folder: Path, *, seed: int = 0) -> Path:
    """A decoder like Llama with biases on query, key and value, and a wider head."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return save(lambda: Qwen2ForCausalLM(Qwen2Config(**_decoder())), folder, seed, tokens=True)


def mistral(folder: Path, *, seed: int = 0) -> Path:
    """A decoder whose tokens look back 6 positions at most (a sliding window)."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**_decoder(), sliding_window=6)
    return save(lambda: MistralForCausalLM(config), folder, seed, tokens=True)


def gemma3(folder: Path, *, seed: int = 0) -> Path:
    """A decoder with layers of both kinds: one with a sliding window, one without."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        **_decoder(),
        head_dim=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    )
    return save(lambda: Gemma3ForCausalLM(config), folder, seed, tokens=True)


def opt(folder: Path, *, seed: int = 0) -> Path:
    """A decoder with learned positions that begin at an offset."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=POSITIONS,
        word_embed_proj_dim=WIDTH,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    return save(lambda: OPTForCausalLM(config), folder, seed, tokens=True)


def bloom(folder: Path, *, seed: int = 0) -> Path:
    """A decoder without positions: its attention falls off with the distance (ALiBi)."""
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        n_layer=2,
        n_head=2,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    return save(lambda: BloomForCausalLM(config), folder, seed, tokens=True)


def vit(folder: Path, *, seed: int = 0) -> Path:
    """A vision transformer with a classifier, for images of 3 x 16 x 16."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=IMAGE,
        patch_size=8,
        num_labels=LABELS,
    )
    return save(lambda: ViTForImageClassification(config), folder, seed)


def resnet(folder: Path, *, seed: int = 0) -> Path:
    """A ResNet with batch norm and a classifier, for images of 3 x 16 x 16."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        num_labels=LABELS,
    )
    return save(lambda: ResNetForImageClassification(config), folder, seed)


MODELS: Mapping[str, Callable[..., Path]] = {
    "bert": bert,
    "bert_classifier": bert_classifier,
    "gpt2": gpt2,
    "llama": llama,
    "vit": vit,
    "resnet": resnet,
}
"""Every pico model by name."""


def sentence_bert(
    folder: Path, *, seed: int = 0, pooling: str = "mean", width: int = WIDTH, layers: int = 2
) -> Path:
    """The encoder as a sentence-transformers folder: pooling ("mean" or "cls") and normalising."""
    import json

    bert(folder, seed=seed, width=width, layers=layers)
    names = ("transformers", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": "" if index == 0 else path,
            "type": f"sentence_transformers.models.{name}",
        }
        for index, (path, name) in enumerate(names)
    ]
    options = {
        "word_embedding_dimension": width,
        "pooling_mode_cls_token": pooling == "cls",
        "pooling_mode_mean_tokens": pooling == "mean",
        "pooling_mode_max_tokens": False,
    }
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(options))
    return folder


def tuned(base: Path, folder: Path, *, seed: int = 1, size: float = 0.02) -> Path:
    """A copy of a folder's model with a small random change in every matrix."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    for tensor in tensors.values():
        if tensor.is_floating_point() and tensor.ndim >= 2:
            tensor += size * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def pixels(count: int = 3, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch for the image models: `pixel_values` float32 (count, 3, 16, 16)."""
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(count, 3, IMAGE, IMAGE, generator=generator)}


def _decoder() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "pad_token_id": 0,
    }


def _bert_options() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": POSITIONS,
    }


def save(make: Callable[[], Any], folder: Path, seed: int = 0, *, tokens: bool = False) -> Path:
    from transformers.utils import logging

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make().eval()
        _randomise(model)
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    if tokens:
        tokenizer().save_pretrained(folder)
    return folder


def save_module(make: Callable[[], torch.nn.Module], folder: Path, seed: int = 0) -> Path:
    """Write the bare weights of a plain module, random ones."""
    from safetensors.torch import save_file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = make().eval()
        _randomise(module)
    folder.mkdir()
    state = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


@torch.no_grad()
def _randomise(model: torch.nn.Module) -> None:
    """Random values everywhere; variances and scales positive, matrices of a usual size."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not tensor.is_floating_point():
            continue
        if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.uniform_(0.5, 1.5)
        else:
            tensor.normal_(0.0, 0.1 if tensor.ndim == 1 else 0.2)


def texts(path: Path, count: int) -> Path:
    """Write texts of 4 to 8 of the tokenizer's words, one a line, which differ."""
    words = WORDS.split()
    lines = [
        " ".join(words[(i * j) % len(words)] for j in range(1, 4 + i % 5)) for i in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def tokenizer() -> Any:
    """A word-level tokenizer over `WORDS`, which frames a text as BERT does."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate((*SPECIALS, *dict.fromkeys(WORDS.split())))}
    core = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = Whitespace()
    core.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=POSITIONS,
        model_input_names=["input_ids", "attention_mask"],
    )
