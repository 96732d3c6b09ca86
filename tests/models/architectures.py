"""A table of tiny architectures of transformers: class, configuration, and inputs at three sizes.

Every entry builds from its configuration, with random weights, in a fraction of a second. Sizes
are as small as the architecture allows, never square where that could hide a transpose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]

WORDS, WIDTH, LENGTH = 48, 16, 40


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        name: in the table and in test names.
        model: the class of transformers.
        config: the class of its configuration.
        options: what the configuration is made with.
        inputs: makes a batch of so many rows and of a size that the kind of input explains.
        sizes: rows and sizes to compare at.
        quick: compressed and merged in CI as well, not only with `--slow`.
    """

    name: str
    model: str
    config: str
    options: Mapping[str, Any]
    inputs: Callable[[int, int], Batch]
    sizes: tuple[tuple[int, int], ...] = ((1, 5), (2, 9), (3, 17))
    quick: bool = False


def tokens(rows: int, size: int) -> Batch:
    """Token ids without padding."""
    chance = torch.Generator().manual_seed(rows + size)
    ids = torch.randint(4, WORDS, (rows, size), generator=chance)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def ids_alone(rows: int, size: int) -> Batch:
    """Token ids for models that know no mask."""
    return {"input_ids": tokens(rows, size)["input_ids"]}


def images(side: int, channels: int = 3) -> Callable[[int, int], Batch]:
    """Images of one size; the second number is not used."""

    def make(rows: int, size: int) -> Batch:
        chance = torch.Generator().manual_seed(rows + size)
        return {"pixel_values": torch.randn(rows, channels, side, side, generator=chance)}

    return make


def sound(rows: int, size: int) -> Batch:
    """Samples of sound, 100 for each unit of size."""
    chance = torch.Generator().manual_seed(rows + size)
    return {"input_values": torch.randn(rows, 100 * size, generator=chance)}


def pairs(rows: int, size: int) -> Batch:
    """Token ids of a source, and of a target of another length."""
    target = tokens(rows, max(2, size // 2))
    return {**tokens(rows, size), "decoder_input_ids": target["input_ids"]}


def features(rows: int, size: int) -> Batch:
    """Whisper's mel features, always 60 frames here, and target tokens."""
    chance = torch.Generator().manual_seed(rows + size)
    return {
        "input_features": torch.randn(rows, 8, 60, generator=chance),
        "decoder_input_ids": tokens(rows, size)["input_ids"],
    }


def pictures_and_words(side: int) -> Callable[[int, int], Batch]:
    """Images and texts."""

    def make(rows: int, size: int) -> Batch:
        return {**tokens(rows, size), **images(side)(rows, size)}

    return make


def boxes(rows: int, size: int) -> Batch:
    """Token ids, each with a box on a page of 1000 x 1000."""
    chance = torch.Generator().manual_seed(rows + size)
    corner = torch.randint(0, 500, (rows, size, 2), generator=chance)
    extent = torch.randint(1, 400, (rows, size, 2), generator=chance)
    return {**tokens(rows, size), "bbox": torch.cat([corner, corner + extent], -1)}


_TEXT: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": LENGTH,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_GROUPED = {**_TEXT, "num_attention_heads": 4, "num_key_value_heads": 2}
_EXPERTS = {**_GROUPED, "moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2}
_VISION: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 24,
    "patch_size": 8,
    "num_labels": 3,
}
_SPEECH: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": [8, 8],
    "conv_kernel": [5, 3],
    "conv_stride": [4, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 12,
    "num_codevectors_per_group": 4,
    "codevector_dim": 8,
    "proj_codevector_dim": 8,
}
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


def _text(name: str, model: str, config: str, **options: Any) -> Architecture:
    quick = bool(options.pop("quick", False))
    inputs = options.pop("inputs", tokens)
    return Architecture(name, model, config, {**_TEXT, **options}, inputs, quick=quick)


def _decoder(name: str, model: str, config: str, **options: Any) -> Architecture:
    quick = bool(options.pop("quick", False))
    return Architecture(name, model, config, {**_GROUPED, **options}, tokens, quick=quick)


def _experts(name: str, model: str, config: str, **options: Any) -> Architecture:
    quick = bool(options.pop("quick", False))
    return Architecture(name, model, config, {**_EXPERTS, **options}, tokens, quick=quick)


def _vision(name: str, model: str, config: str, **options: Any) -> Architecture:
    quick, side = bool(options.pop("quick", False)), options.get("image_size", 24)
    made = {**_VISION, **options}
    return Architecture(name, model, config, made, images(side), ((1, 0), (2, 0), (5, 0)), quick)


def _network(name: str, model: str, config: str, side: int, **options: Any) -> Architecture:
    quick = bool(options.pop("quick", False))
    made = {"num_labels": 3, **options}
    return Architecture(name, model, config, made, images(side), ((1, 0), (2, 0), (5, 0)), quick)


def _speech(name: str, model: str, config: str, **options: Any) -> Architecture:
    quick = bool(options.pop("quick", False))
    sizes = ((1, 8), (2, 13), (3, 20))
    return Architecture(name, model, config, {**_SPEECH, **options}, sound, sizes, quick)


def _seq2seq(name: str, model: str, config: str, **options: Any) -> Architecture:
    quick = bool(options.pop("quick", False))
    base = _T5 if options.pop("t5", False) else _SEQ2SEQ
    return Architecture(name, model, config, {**base, **options}, pairs, quick=quick)


TABLE: tuple[Architecture, ...] = (
    # Encoders
    _text("bert", "BertForSequenceClassification", "BertConfig", num_labels=3, quick=True),
    _text("bert-mlm", "BertForMaskedLM", "BertConfig", quick=True),
    _text("bert-ner", "BertForTokenClassification", "BertConfig", num_labels=5),
    _text("bert-qa", "BertForQuestionAnswering", "BertConfig"),
    _text("bert-bare", "BertModel", "BertConfig"),
    _text("roberta", "RobertaForSequenceClassification", "RobertaConfig", pad_token_id=1),
    _text("roberta-mlm", "RobertaForMaskedLM", "RobertaConfig", pad_token_id=1),
    _text("xlm-roberta", "XLMRobertaForMaskedLM", "XLMRobertaConfig", pad_token_id=1),
    _text("camembert", "CamembertForMaskedLM", "CamembertConfig", pad_token_id=1),
    _text("electra", "ElectraForMaskedLM", "ElectraConfig", embedding_size=8),
    _text(
        "distilbert",
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        dim=WIDTH,
        hidden_dim=24,
        n_layers=1,
        n_heads=2,
    ),
    _text("albert", "AlbertForMaskedLM", "AlbertConfig", embedding_size=8, quick=True),
    _text("mpnet", "MPNetForMaskedLM", "MPNetConfig", pad_token_id=1),
    _text("deberta", "DebertaForMaskedLM", "DebertaConfig"),
    _text("deberta-v2", "DebertaV2ForMaskedLM", "DebertaV2Config"),
    _text(
        "modernbert",
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        num_hidden_layers=2,
        cls_token_id=2,
        sep_token_id=3,
        global_attn_every_n_layers=1,
        local_attention=8,
        quick=True,
    ),
    _text("megatron-bert", "MegatronBertForMaskedLM", "MegatronBertConfig"),
    _text("roformer", "RoFormerForMaskedLM", "RoFormerConfig", embedding_size=8),
    _text(
        "nystromformer",
        "NystromformerForMaskedLM",
        "NystromformerConfig",
        num_landmarks=4,
        segment_means_seq_len=4,
    ),
    _text(
        "mobilebert",
        "MobileBertForMaskedLM",
        "MobileBertConfig",
        true_hidden_size=8,
        embedding_size=8,
        intra_bottleneck_size=8,
        num_feedforward_networks=1,
    ),
    _text(
        "squeezebert",
        "SqueezeBertForMaskedLM",
        "SqueezeBertConfig",
        embedding_size=WIDTH,
        q_groups=2,
        k_groups=2,
        v_groups=2,
        post_attention_groups=1,
        intermediate_groups=2,
        output_groups=2,
    ),
    _text("convbert", "ConvBertForMaskedLM", "ConvBertConfig", embedding_size=8),
    _text("fnet", "FNetForMaskedLM", "FNetConfig", inputs=ids_alone),
    _text(
        "xlm", "XLMWithLMHeadModel", "XLMConfig", emb_dim=WIDTH, n_layers=1, n_heads=2, pad_index=0
    ),
    _text("splinter", "SplinterModel", "SplinterConfig"),
    _text("ernie", "ErnieForMaskedLM", "ErnieConfig"),
    _text(
        "rembert",
        "RemBertForMaskedLM",
        "RemBertConfig",
        input_embedding_size=8,
        output_embedding_size=12,
    ),
    _text(
        "layoutlm",
        "LayoutLMForTokenClassification",
        "LayoutLMConfig",
        inputs=boxes,
        max_2d_position_embeddings=1024,
    ),
    # Decoders
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
    _text("gpt-neox", "GPTNeoXForCausalLM", "GPTNeoXConfig"),
    _text("opt", "OPTForCausalLM", "OPTConfig", ffn_dim=24, word_embed_proj_dim=WIDTH),
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
    _text("falcon", "FalconForCausalLM", "FalconConfig", new_decoder_architecture=False),
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
    _decoder("helium", "HeliumForCausalLM", "HeliumConfig", head_dim=8),
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
    # Vision
    _vision("vit", "ViTForImageClassification", "ViTConfig", quick=True),
    _vision("vit-bare", "ViTModel", "ViTConfig"),
    _vision("deit", "DeiTForImageClassification", "DeiTConfig"),
    _vision("beit", "BeitForImageClassification", "BeitConfig"),
    _vision("data2vec-vision", "Data2VecVisionForImageClassification", "Data2VecVisionConfig"),
    _vision("dinov2", "Dinov2Model", "Dinov2Config", mlp_ratio=2, quick=True),
    _vision(
        "dinov2-registers", "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", mlp_ratio=2
    ),
    _vision(
        "clip-vision",
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        projection_dim=8,
        quick=True,
    ),
    _vision("siglip-vision", "SiglipVisionModel", "SiglipVisionConfig"),
    _vision("vit-mae", "ViTMAEModel", "ViTMAEConfig", mask_ratio=0.0),
    _network(
        "yolos",
        "YolosForObjectDetection",
        "YolosConfig",
        24,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=[24, 24],
        patch_size=8,
        num_detection_tokens=5,
        quick=True,
    ),
    _network(
        "swin",
        "SwinForImageClassification",
        "SwinConfig",
        16,
        image_size=16,
        patch_size=2,
        embed_dim=8,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=2,
    ),
    _network(
        "swinv2",
        "Swinv2ForImageClassification",
        "Swinv2Config",
        16,
        image_size=16,
        patch_size=2,
        embed_dim=8,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=2,
    ),
    _network(
        "resnet",
        "ResNetForImageClassification",
        "ResNetConfig",
        32,
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        quick=True,
    ),
    _network(
        "convnext",
        "ConvNextForImageClassification",
        "ConvNextConfig",
        32,
        hidden_sizes=[8, 12],
        depths=[1, 1],
        num_stages=2,
        quick=True,
    ),
    _network(
        "convnextv2",
        "ConvNextV2ForImageClassification",
        "ConvNextV2Config",
        32,
        hidden_sizes=[8, 12],
        depths=[1, 1],
        num_stages=2,
    ),
    _network(
        "segformer",
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        32,
        hidden_sizes=[8, 12],
        depths=[1, 1],
        num_encoder_blocks=2,
        sr_ratios=[2, 1],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=8,
    ),
    _network(
        "regnet",
        "RegNetForImageClassification",
        "RegNetConfig",
        32,
        embedding_size=8,
        hidden_sizes=[8, 12],
        depths=[1, 1],
        groups_width=4,
    ),
    _network(
        "mobilenet-v2",
        "MobileNetV2ForImageClassification",
        "MobileNetV2Config",
        32,
        depth_multiplier=0.25,
        min_depth=4,
    ),
    _network(
        "mobilevit",
        "MobileViTForImageClassification",
        "MobileViTConfig",
        32,
        image_size=32,
        hidden_sizes=[8, 8, 8],
        neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 8],
    ),
    _network(
        "poolformer",
        "PoolFormerForImageClassification",
        "PoolFormerConfig",
        32,
        hidden_sizes=[8, 8, 8, 8],
        depths=[1, 1, 1, 1],
    ),
    _network(
        "pvt",
        "PvtForImageClassification",
        "PvtConfig",
        32,
        image_size=32,
        hidden_sizes=[8, 8, 8, 8],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2],
        mlp_ratios=[2, 2, 2, 2],
    ),
    _network(
        "levit",
        "LevitForImageClassification",
        "LevitConfig",
        32,
        image_size=32,
        hidden_sizes=[8, 12, 16],
        num_attention_heads=[1, 1, 2],
        depths=[1, 1, 1],
        key_dim=[4, 4, 4],
    ),
    _network(
        "bit",
        "BitForImageClassification",
        "BitConfig",
        32,
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        num_groups=2,
    ),
    _network(
        "dpt",
        "DPTForDepthEstimation",
        "DPTConfig",
        32,
        hidden_size=WIDTH,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=32,
        patch_size=8,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
    ),
    # Speech
    _speech("wav2vec2", "Wav2Vec2ForCTC", "Wav2Vec2Config", quick=True),
    _speech("hubert", "HubertForCTC", "HubertConfig"),
    _speech("wavlm", "WavLMForCTC", "WavLMConfig"),
    _speech("unispeech", "UniSpeechForCTC", "UniSpeechConfig", num_ctc_classes=12),
    _speech("data2vec-audio", "Data2VecAudioForCTC", "Data2VecAudioConfig"),
    # Encoder-decoders
    _seq2seq("t5", "T5ForConditionalGeneration", "T5Config", t5=True, quick=True),
    _seq2seq("mt5", "MT5ForConditionalGeneration", "MT5Config", t5=True),
    _seq2seq("umt5", "UMT5ForConditionalGeneration", "UMT5Config", t5=True),
    _seq2seq("bart", "BartForConditionalGeneration", "BartConfig", quick=True),
    _seq2seq("mbart", "MBartForConditionalGeneration", "MBartConfig"),
    _seq2seq("marian", "MarianMTModel", "MarianConfig"),
    _seq2seq("pegasus", "PegasusForConditionalGeneration", "PegasusConfig"),
    _seq2seq("m2m100", "M2M100ForConditionalGeneration", "M2M100Config"),
    _seq2seq("blenderbot", "BlenderbotForConditionalGeneration", "BlenderbotConfig"),
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
            "text_config": {**_TEXT, "projection_dim": 8},
            "vision_config": {**_VISION, "projection_dim": 8},
            "projection_dim": 8,
        },
        pictures_and_words(24),
    ),
    Architecture(
        "siglip",
        "SiglipModel",
        "SiglipConfig",
        {"text_config": {**_TEXT, "projection_size": WIDTH}, "vision_config": dict(_VISION)},
        pictures_and_words(24),
    ),
)
