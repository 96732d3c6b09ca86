"""Describe a Whisper's two graphs to ONNX Runtime GenAI, by a `genai_config.json` beside them.

Source: https://onnxruntime.ai/docs/genai/reference/config.html, and the model builder of
onnxruntime-genai 0.18. That package runs Whisper alone among encoder-decoders, and of sounds
exactly 3000 frames; names of inputs and outputs it takes from the configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kilodelta.export.decoder.genai import search_settings, write_config
from kilodelta.export.manifest.facts import Port
from kilodelta.export.onnx.template import Template
from kilodelta.export.seq2seq.halves import CACHED_FILE, ENCODER_FILE
from kilodelta.models import LoadedModel
from kilodelta.models.generation.cache import PAST, PRESENT
from kilodelta.models.generation.seq2seq import CROSS, DECODER, ENCODED, OWN
from kilodelta.models.generation.special_tokens import SpecialTokens, special_tokens

WHISPER, FRAMES = "whisper", 3000
FEATURES = "input_features"


def why_no_genai(loaded: LoadedModel, inputs: tuple[Port, ...]) -> str | None:
    """Return why ONNX Runtime GenAI does not run an encoder-decoder with a cache; None if it does.

    Args:
        loaded: the model.
        inputs: of its encoder's graph.
    """
    kind = str(loaded.module.config.model_type)  # type: ignore[union-attr]
    if kind != WHISPER:
        return f"no genai_config.json: ONNX Runtime GenAI knows no {kind}"
    frames = _port(inputs, FEATURES).shape[2]
    if frames != FRAMES:
        return (
            f"no genai_config.json: ONNX Runtime GenAI feeds a Whisper {FRAMES} frames, and this "
            f"one hears {frames}"
        )
    return None


def write_whisper_config(
    templates: Mapping[str, Template],
    files: Mapping[str, str],
    loaded: LoadedModel,
    source: Path,
    out: Path,
) -> tuple[Path, ...]:
    """Write `genai_config.json` and the tokenizer's files beside a Whisper's graphs with a cache.

    Args:
        templates: the encoder's and the decoder's.
        files: the names of their files, by the same keys.
        loaded: the model.
        source: the merged model that it was opened from.
        out: the folder with the graphs.

    Returns:
        The files written.

    Raises:
        InputError: the model does not say which token ends a text.
    """
    config = whisper_config(templates, files, loaded, special_tokens(loaded, source))
    return write_config(config, source, out)


def whisper_config(
    templates: Mapping[str, Template],
    files: Mapping[str, str],
    loaded: LoadedModel,
    tokens: SpecialTokens,
) -> dict[str, Any]:
    """Describe a Whisper's graphs with a cache.

    Args:
        templates: both graphs by file name, as they were exported.
        files: by the same names, what the files are called in the folder.
        loaded: the merged model.
        tokens: those that begin, end and pad its texts.
    """
    encoder, decoder = templates[ENCODER_FILE], templates[CACHED_FILE]
    config: Any = loaded.module.config
    return {
        "model": {
            "type": WHISPER,
            "bos_token_id": tokens.begin,
            "eos_token_id": list(tokens.end),
            "pad_token_id": tokens.pad,
            "context_length": int(config.max_target_positions),
            "vocab_size": int(_port(decoder.outputs, "logits").shape[-1]),
            "encoder": {
                "filename": files[ENCODER_FILE],
                **_sizes(encoder.outputs, f"{PRESENT}.0.{CROSS}.key", config, "encoder"),
                "inputs": {"audio_features": FEATURES},
                "outputs": {
                    "encoder_hidden_states": ENCODED,
                    "cross_present_key_names": f"{PRESENT}.%d.{CROSS}.key",
                    "cross_present_value_names": f"{PRESENT}.%d.{CROSS}.value",
                },
            },
            "decoder": {
                "filename": files[CACHED_FILE],
                **_sizes(decoder.inputs, f"{PAST}.0.{OWN}.key", config, "decoder"),
                "inputs": {
                    "input_ids": DECODER,
                    "past_key_names": f"{PAST}.%d.{OWN}.key",
                    "past_value_names": f"{PAST}.%d.{OWN}.value",
                    "cross_past_key_names": f"{PAST}.%d.{CROSS}.key",
                    "cross_past_value_names": f"{PAST}.%d.{CROSS}.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": f"{PRESENT}.%d.{OWN}.key",
                    "present_value_names": f"{PRESENT}.%d.{OWN}.value",
                },
            },
        },
        "search": search_settings(int(config.max_target_positions)),
    }


def _sizes(ports: tuple[Port, ...], key: str, config: Any, half: str) -> dict[str, Any]:
    heads, size = (int(_port(ports, key).shape[n]) for n in (1, 3))
    return {
        "session_options": {"provider_options": []},
        "head_size": size,
        "hidden_size": int(config.d_model),
        "num_attention_heads": heads,
        "num_hidden_layers": int(getattr(config, f"{half}_layers")),
        "num_key_value_heads": heads,
    }


def _port(ports: tuple[Port, ...], name: str) -> Port:
    return next(port for port in ports if port.name == name)
