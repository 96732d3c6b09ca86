"""Write what ONNX Runtime GenAI reads beside a graph: `genai_config.json`, and a tokenizer's files.

Source: https://onnxruntime.ai/docs/genai/reference/config.html. GenAI refuses keys that it does
not know, so nothing of kilodelta's stands in that file. It also runs a graph without a cache, and
is silently wrong from the second token on: the configuration is only ever written for a graph that
has one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kilodelta.errors import ExportError
from kilodelta.export.onnx.template import Template
from kilodelta.files import plain, staging
from kilodelta.models import LoadedModel
from kilodelta.models.generation.cache import PAST, PRESENT
from kilodelta.models.generation.special_tokens import SpecialTokens, special_tokens

CONFIG = "genai_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
"""What tokenizers of transformers consist of; a folder holds some of them."""
_LIMIT = 1 << 28
"""Bytes of one of them."""


def write_genai(
    graph: Path, template: Template, loaded: LoadedModel, source: Path
) -> tuple[Path, ...]:
    """Write `genai_config.json` and the tokenizer's files beside a graph with a cache.

    Args:
        graph: the ONNX file.
        template: what it was made from.
        loaded: the model.
        source: the merged model that it was opened from; a single file has no tokenizer.

    Returns:
        The files written.

    Raises:
        ExportError: the graph has no cache.
        InputError: the model does not say which token ends a text.
    """
    config = genai_config(graph.name, template, loaded, special_tokens(loaded, source))
    return write_config(config, source, graph.parent)


def write_config(config: dict[str, Any], source: Path, out: Path) -> tuple[Path, ...]:
    """Write a `genai_config.json`, and copies of a model's tokenizer files beside it.

    Args:
        config: what it says.
        source: the model; a single file has no tokenizer.
        out: the folder.

    Returns:
        The files written.
    """
    text = json.dumps(config, indent=2, ensure_ascii=False)
    staging.write(out / CONFIG, text.encode("utf-8") + b"\n")
    return (out / CONFIG, *_copy_tokenizer(source, out))


def genai_config(
    model: str, template: Template, loaded: LoadedModel, tokens: SpecialTokens
) -> dict[str, Any]:
    """Describe a graph with a cache to ONNX Runtime GenAI.

    Args:
        model: the file name of the graph.
        template: what the graph was made from.
        loaded: the model, whose configuration says the sizes.
        tokens: its special tokens.

    Raises:
        ExportError: the graph has no cache.
    """
    keys = [p for p in template.inputs if p.name.startswith(f"{PAST}.") and p.name.endswith(".key")]
    if not keys or not any(p.name.startswith(f"{PRESENT}.") for p in template.outputs):
        raise ExportError(
            f"{model} has no cache, and ONNX Runtime GenAI would run it without one, wrongly",
            fix="export with --kv-cache",
        )
    config = loaded.module.config.get_text_config()  # type: ignore[operator, union-attr]
    logits = next(port for port in template.outputs if port.name == "logits")
    context = loaded.max_length or template.sizes["total_sequence"][2]
    return {
        "model": {
            # `decoder` is GenAI's general type: it takes the names of the graph as they are.
            "type": "decoder",
            "bos_token_id": tokens.begin,
            "eos_token_id": list(tokens.end),
            "pad_token_id": tokens.pad,
            "context_length": context,
            "vocab_size": int(logits.shape[-1]),
            "decoder": {
                "session_options": {"provider_options": []},
                "filename": model,
                "head_size": int(keys[0].shape[3]),
                "hidden_size": int(config.hidden_size),
                "num_attention_heads": int(config.num_attention_heads),
                "num_hidden_layers": len(keys),
                "num_key_value_heads": int(keys[0].shape[1]),
                "inputs": {
                    **{p.name: p.name for p in template.inputs if "." not in p.name},
                    "past_key_names": f"{PAST}.%d.key",
                    "past_value_names": f"{PAST}.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": f"{PRESENT}.%d.key",
                    "present_value_names": f"{PRESENT}.%d.value",
                },
            },
        },
        "search": search_settings(context),
    }


def search_settings(context: int) -> dict[str, Any]:
    """Return how texts are written unless the caller says otherwise: greedily, up to `context`."""
    return {
        "do_sample": False,
        "max_length": context,
        # The graph returns a longer cache each step; a shared buffer would need one in place.
        "past_present_share_buffer": False,
    }


def _copy_tokenizer(source: Path, stage: Path) -> list[Path]:
    copies = []
    for name in TOKENIZER_FILES if source.is_dir() else ():
        place = source / name
        if plain.is_file(place):
            staging.write(stage / name, plain.read(place, _LIMIT))
            copies.append(stage / name)
    return copies
