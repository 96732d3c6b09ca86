"""Decoders, state spaces, and mixtures of experts."""

from __future__ import annotations

from typing import Any

from tests.models.architectures.architecture import (
    LENGTH,
    TEXT,
    WIDTH,
    WORDS,
    Architecture,
    ids_alone,
    text,
    tokens,
)

_GROUPED = {**TEXT, "num_attention_heads": 4, "num_key_value_heads": 2}
_EXPERTS = {**_GROUPED, "moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2}


def _decoder(name: str, model: str, config: str, **options: Any) -> Architecture:
    quick = bool(options.pop("quick", False))
    return Architecture(name, model, config, {**_GROUPED, **options}, tokens, quick=quick)


def _experts(name: str, model: str, config: str, **options: Any) -> Architecture:
    quick = bool(options.pop("quick", False))
    return Architecture(name, model, config, {**_EXPERTS, **options}, tokens, quick=quick)


ROWS: tuple[Architecture, ...] = (
    Architecture(
        "gpt2",
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": WORDS,
            "n_embd": WIDTH,
            "n_layer": 1,
            "n_head": 2,
            "n_positions": LENGTH,
            "bos_token_id": 2,
            "eos_token_id": 3,
        },
        tokens,
        quick=True,
    ),
    Architecture(
        "gpt-bigcode",
        "GPTBigCodeForCausalLM",
        "GPTBigCodeConfig",
        {
            "vocab_size": WORDS,
            "n_embd": WIDTH,
            "n_layer": 1,
            "n_head": 2,
            "n_positions": LENGTH,
            "bos_token_id": 2,
            "eos_token_id": 3,
        },
        tokens,
    ),
    Architecture(
        "gptj",
        "GPTJForCausalLM",
        "GPTJConfig",
        {
            "vocab_size": WORDS,
            "n_embd": WIDTH,
            "n_layer": 1,
            "n_head": 2,
            "rotary_dim": 4,
            "n_positions": LENGTH,
            "bos_token_id": 2,
            "eos_token_id": 3,
        },
        tokens,
    ),
    Architecture(
        "gpt-neo",
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            "vocab_size": WORDS,
            "hidden_size": WIDTH,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
            "max_position_embeddings": LENGTH,
            "bos_token_id": 2,
            "eos_token_id": 3,
        },
        tokens,
    ),
    text("gpt-neox", "GPTNeoXForCausalLM", "GPTNeoXConfig"),
    text("opt", "OPTForCausalLM", "OPTConfig", ffn_dim=24, word_embed_proj_dim=WIDTH),
    Architecture(
        "bloom",
        "BloomForCausalLM",
        "BloomConfig",
        {
            "vocab_size": WORDS,
            "hidden_size": WIDTH,
            "n_layer": 1,
            "n_head": 2,
            "bos_token_id": 2,
            "eos_token_id": 3,
        },
        tokens,
    ),
    text("falcon", "FalconForCausalLM", "FalconConfig", new_decoder_architecture=False),
    Architecture(
        "mpt",
        "MptForCausalLM",
        "MptConfig",
        {
            "vocab_size": WORDS,
            "d_model": WIDTH,
            "n_layers": 1,
            "n_heads": 2,
            "max_seq_len": LENGTH,
            "expansion_ratio": 2,
        },
        tokens,
    ),
    Architecture(
        "codegen",
        "CodeGenForCausalLM",
        "CodeGenConfig",
        {
            "vocab_size": WORDS,
            "n_embd": WIDTH,
            "n_layer": 1,
            "n_head": 4,
            "rotary_dim": 4,
            "n_positions": LENGTH,
            "bos_token_id": 2,
            "eos_token_id": 3,
        },
        tokens,
    ),
    _decoder("llama", "LlamaForCausalLM", "LlamaConfig", num_hidden_layers=2, quick=True),
    _decoder("llama-tied", "LlamaForCausalLM", "LlamaConfig", tie_word_embeddings=True),
    _decoder("llama-classifier", "LlamaForSequenceClassification", "LlamaConfig", num_labels=3),
    _decoder("mistral", "MistralForCausalLM", "MistralConfig", sliding_window=8),
    _decoder("qwen2", "Qwen2ForCausalLM", "Qwen2Config", quick=True),
    _decoder("qwen3", "Qwen3ForCausalLM", "Qwen3Config", head_dim=8),
    _decoder("phi", "PhiForCausalLM", "PhiConfig"),
    _decoder("phi3", "Phi3ForCausalLM", "Phi3Config", quick=True),
    _decoder("gemma", "GemmaForCausalLM", "GemmaConfig", head_dim=8),
    _decoder(
        "gemma2",
        "Gemma2ForCausalLM",
        "Gemma2Config",
        num_hidden_layers=2,
        head_dim=8,
        sliding_window=8,
    ),
    _decoder(
        "gemma3",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        num_hidden_layers=2,
        head_dim=8,
        sliding_window=8,
    ),
    _decoder("stablelm", "StableLmForCausalLM", "StableLmConfig"),
    _decoder("starcoder2", "Starcoder2ForCausalLM", "Starcoder2Config"),
    _decoder("cohere", "CohereForCausalLM", "CohereConfig"),
    _decoder(
        "cohere2", "Cohere2ForCausalLM", "Cohere2Config", num_hidden_layers=2, sliding_window=8
    ),
    _decoder("olmo", "OlmoForCausalLM", "OlmoConfig"),
    _decoder("olmo2", "Olmo2ForCausalLM", "Olmo2Config"),
    _decoder("granite", "GraniteForCausalLM", "GraniteConfig"),
    _decoder("smollm3", "SmolLM3ForCausalLM", "SmolLM3Config", num_hidden_layers=2),
    _decoder("nemotron", "NemotronForCausalLM", "NemotronConfig"),
    _decoder("glm", "GlmForCausalLM", "GlmConfig", head_dim=8),
    _decoder("glm4", "Glm4ForCausalLM", "Glm4Config", head_dim=8),
    _decoder("ernie4.5", "Ernie4_5ForCausalLM", "Ernie4_5Config", head_dim=8),
    _decoder(
        "exaone4", "Exaone4ForCausalLM", "Exaone4Config", num_hidden_layers=2, sliding_window=8
    ),
    _decoder("helium", "HeliumForCausalLM", "HeliumConfig", head_dim=4),
    _decoder("seed-oss", "SeedOssForCausalLM", "SeedOssConfig", head_dim=8),
    _decoder("arcee", "ArceeForCausalLM", "ArceeConfig"),
    _decoder("apertus", "ApertusForCausalLM", "ApertusConfig"),
    _decoder("persimmon", "PersimmonForCausalLM", "PersimmonConfig"),
    _decoder("biogpt", "BioGptForCausalLM", "BioGptConfig"),
    # State spaces and recurrences
    Architecture(
        "mamba",
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": WORDS, "hidden_size": 8, "state_size": 4, "num_hidden_layers": 2},
        ids_alone,
    ),
    Architecture(
        "mamba2",
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            "vocab_size": WORDS,
            "hidden_size": 16,
            "state_size": 4,
            "num_hidden_layers": 2,
            "num_heads": 4,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
        ids_alone,
    ),
    Architecture(
        "falcon-mamba",
        "FalconMambaForCausalLM",
        "FalconMambaConfig",
        {"vocab_size": WORDS, "hidden_size": 8, "state_size": 4, "num_hidden_layers": 2},
        ids_alone,
    ),
    Architecture(
        "jamba",
        "JambaForCausalLM",
        "JambaConfig",
        {
            **TEXT,
            "num_hidden_layers": 2,
            "num_key_value_heads": 1,
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 4,
        },
        tokens,
    ),
    # Experts
    _experts("mixtral", "MixtralForCausalLM", "MixtralConfig", num_local_experts=4, quick=True),
    _experts("qwen3-moe", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", head_dim=8),
    _experts(
        "qwen2-moe", "Qwen2MoeForCausalLM", "Qwen2MoeConfig", shared_expert_intermediate_size=12
    ),
    _experts("olmoe", "OlmoeForCausalLM", "OlmoeConfig"),
    _experts("granite-moe", "GraniteMoeForCausalLM", "GraniteMoeConfig", num_local_experts=4),
    _experts(
        "gpt-oss",
        "GptOssForCausalLM",
        "GptOssConfig",
        num_local_experts=4,
        num_hidden_layers=2,
        head_dim=8,
        sliding_window=8,
    ),
    _experts("jetmoe", "JetMoeForCausalLM", "JetMoeConfig", num_local_experts=4, kv_channels=8),
    _experts(
        "llama4",
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        num_local_experts=4,
        interleave_moe_layer_step=1,
        head_dim=8,
        intermediate_size_mlp=24,
    ),
    Architecture(
        "dbrx",
        "DbrxForCausalLM",
        "DbrxConfig",
        {
            "vocab_size": WORDS,
            "d_model": WIDTH,
            "n_heads": 2,
            "n_layers": 1,
            "max_seq_len": LENGTH,
            "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 12, "moe_num_experts": 4, "moe_top_k": 2},
            "pad_token_id": 0,
        },
        tokens,
    ),
)
