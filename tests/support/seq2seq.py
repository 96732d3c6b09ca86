"""Pico encoder-decoders: texts, sounds and images in, texts out."""

from __future__ import annotations

from pathlib import Path

from tests.support import pico


def t5(folder: Path, *, layers: int = 1, width: int = 16) -> Path:
    """An encoder-decoder with a tokenizer, relative positions and a tied embedding.

    Of width 32 all its products can be quantised in groups of 32.
    """
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=pico.VOCABULARY,
        d_model=width,
        d_kv=width // 2,
        d_ff=24 if width == 16 else 2 * width,
        num_layers=layers,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=3,
        decoder_start_token_id=0,
    )
    return pico.save(lambda: T5ForConditionalGeneration(config), folder, tokens=True)


def whisper(folder: Path, *, layers: int = 1, width: int = 16, seconds: int = 1) -> Path:
    """A Whisper that hears one second (OpenAI's hear 30), with its feature extractor and a
    tokenizer."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=pico.VOCABULARY,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24 if width == 16 else 2 * width,
        decoder_ffn_dim=24 if width == 16 else 2 * width,
        num_mel_bins=8,
        max_source_positions=50 * seconds,
        max_target_positions=20,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        decoder_start_token_id=2,
        begin_suppress_tokens=None,
        suppress_tokens=None,
    )
    pico.save(lambda: WhisperForConditionalGeneration(config), folder, tokens=True)
    WhisperFeatureExtractor(feature_size=8, chunk_length=seconds).save_pretrained(folder)
    return folder


def bart(folder: Path) -> Path:
    """An encoder-decoder with learned positions that begin at an offset."""
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        **_sizes(), max_position_embeddings=pico.POSITIONS, forced_eos_token_id=None
    )
    return pico.save(lambda: BartForConditionalGeneration(config), folder, tokens=True)


def marian(folder: Path) -> Path:
    """A translator with sinusoidal positions."""
    from transformers import MarianConfig, MarianMTModel

    config = MarianConfig(
        **_sizes(), max_position_embeddings=pico.POSITIONS, forced_eos_token_id=None
    )
    return pico.save(lambda: MarianMTModel(config), folder, tokens=True)


def captioner(folder: Path) -> Path:
    """A vision transformer before a decoder of another width, joined by a projection."""
    from transformers import (
        TrOCRConfig,
        VisionEncoderDecoderConfig,
        VisionEncoderDecoderModel,
        ViTConfig,
        ViTImageProcessor,
    )

    sees = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=pico.IMAGE,
        patch_size=8,
    )
    writes = TrOCRConfig(
        vocab_size=pico.VOCABULARY,
        d_model=16,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=24,
        max_position_embeddings=pico.POSITIONS,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        decoder_start_token_id=2,
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(sees, writes)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 2, 0, 3
    pico.save(lambda: VisionEncoderDecoderModel(config), folder, tokens=True)
    size = {"height": pico.IMAGE, "width": pico.IMAGE}
    ViTImageProcessor(size=size).save_pretrained(folder)
    return folder


def _sizes() -> dict[str, int]:
    return {
        "vocab_size": pico.VOCABULARY,
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "decoder_start_token_id": 3,
    }
