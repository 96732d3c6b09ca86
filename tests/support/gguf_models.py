"""Tiny decoders as llama.cpp's converter would write them: Q4_1 blocks, rotary rows interleaved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

HEADS, KEYS, WIDTH, LAYERS, WORDS = 4, 2, 64, 2, 40


def config(kind: str = "llama") -> Any:
    """The configuration of a decoder of two layers."""
    from transformers import AutoConfig

    return AutoConfig.for_model(
        kind,
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEYS,
        head_dim=WIDTH // HEADS,
        vocab_size=WORDS,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


def model(kind: str = "llama", seed: int = 0) -> Any:
    """A random decoder; biases and norms are random as well."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config(kind))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return made.eval()


def write_gguf(path: Path, decoder: Any, *, block: str = "Q4_1") -> Path:
    """Write a decoder as a GGUF file: its matrices in blocks, the rest as float32."""
    import gguf

    own = decoder.config
    kind = own.model_type
    names = gguf.get_tensor_name_map(
        next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == kind), LAYERS
    )
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(own.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_key_length(own.head_dim)
    writer.add_value_length(own.head_dim)
    writer.add_rope_dimension_count(own.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(own.rms_norm_eps)
    writer.add_vocab_size(WORDS)
    for name, value in decoder.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        array = value.numpy().astype(np.float32)
        if kind == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = HEADS if "q_proj" in name else KEYS
            # llama.cpp's `permute`, as its converter spells it
            parts = array.reshape(heads, 2, len(array) // heads // 2, *array.shape[1:])
            array = parts.swapaxes(1, 2).reshape(array.shape)
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if array.ndim == 2 and theirs.startswith("blk."):
            type_ = gguf.GGMLQuantizationType[block]
            writer.add_tensor(theirs, gguf.quants.quantize(array, type_), raw_dtype=type_)
        else:
            writer.add_tensor(theirs, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
