"""Models of several inputs: encoder-decoders, and towers for images and texts."""

from __future__ import annotations

from typing import Any

from tests.models.architectures.architecture import (
    LENGTH,
    TEXT,
    VISION,
    WIDTH,
    WORDS,
    Architecture,
    features,
    pairs,
    pictures_and_words,
    spectra,
)

_SEQ2SEQ: dict[str, Any] = {
    "vocab_size": WORDS,
    "d_model": WIDTH,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": LENGTH,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_TOKENS = (
    "vocab_size",
    "max_position_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "decoder_start_token_id",
)
_T5: dict[str, Any] = {
    "vocab_size": WORDS,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 3,
    "decoder_start_token_id": 0,
}
_BIAS = ("final_logits_bias",)
"""A row that BART and its kin keep in their files as a buffer; the tuned copies change it."""


def _seq2seq(name: str, model: str, config: str, **options: Any) -> Architecture:
    quick = bool(options.pop("quick", False))
    whole = options.pop("whole", ())
    base = _T5 if options.pop("t5", False) else _SEQ2SEQ
    return Architecture(name, model, config, {**base, **options}, pairs, quick=quick, whole=whole)


ROWS: tuple[Architecture, ...] = (
    _seq2seq("t5", "T5ForConditionalGeneration", "T5Config", t5=True, quick=True),
    _seq2seq("mt5", "MT5ForConditionalGeneration", "MT5Config", t5=True),
    _seq2seq("umt5", "UMT5ForConditionalGeneration", "UMT5Config", t5=True),
    _seq2seq("bart", "BartForConditionalGeneration", "BartConfig", quick=True, whole=_BIAS),
    _seq2seq("mbart", "MBartForConditionalGeneration", "MBartConfig", whole=_BIAS),
    _seq2seq("marian", "MarianMTModel", "MarianConfig", whole=_BIAS),
    _seq2seq("pegasus", "PegasusForConditionalGeneration", "PegasusConfig", whole=_BIAS),
    _seq2seq("m2m100", "M2M100ForConditionalGeneration", "M2M100Config"),
    _seq2seq("blenderbot", "BlenderbotForConditionalGeneration", "BlenderbotConfig", whole=_BIAS),
    _seq2seq("plbart", "PLBartForConditionalGeneration", "PLBartConfig", whole=_BIAS),
    _seq2seq(
        "blenderbot-small",
        "BlenderbotSmallForConditionalGeneration",
        "BlenderbotSmallConfig",
        whole=_BIAS,
    ),
    _seq2seq(
        "led",
        "LEDForConditionalGeneration",
        "LEDConfig",
        whole=_BIAS,
        attention_window=4,
        max_encoder_position_embeddings=LENGTH,
        max_decoder_position_embeddings=LENGTH,
    ),
    _seq2seq(
        "nllb-moe",
        "NllbMoeForConditionalGeneration",
        "NllbMoeConfig",
        num_experts=4,
        encoder_sparse_step=1,
        decoder_sparse_step=1,
    ),
    Architecture(
        "prophetnet",
        "ProphetNetForConditionalGeneration",
        "ProphetNetConfig",
        {
            **{k: _SEQ2SEQ[k] for k in _TOKENS},
            "hidden_size": WIDTH,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "num_encoder_layers": 1,
            "num_decoder_layers": 1,
            "num_encoder_attention_heads": 2,
            "num_decoder_attention_heads": 2,
        },
        pairs,
    ),
    Architecture(
        "speech-to-text",
        "Speech2TextForConditionalGeneration",
        "Speech2TextConfig",
        {
            **_SEQ2SEQ,
            "input_feat_per_channel": 8,
            "conv_channels": 12,
            "max_source_positions": 60,
            "max_target_positions": LENGTH,
        },
        spectra,
    ),
    Architecture(
        "whisper",
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 30, "max_target_positions": LENGTH},
        features,
        ((1, 3), (2, 7), (3, 11)),
        quick=True,
    ),
    # Several inputs
    Architecture(
        "clip",
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": {**TEXT, "projection_dim": 8},
            "vision_config": {**VISION, "projection_dim": 8},
            "projection_dim": 8,
        },
        pictures_and_words(24),
    ),
    Architecture(
        "siglip",
        "SiglipModel",
        "SiglipConfig",
        {"text_config": {**TEXT, "projection_size": WIDTH}, "vision_config": dict(VISION)},
        pictures_and_words(24),
    ),
)
