"""Networks and transformers for images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.models.architectures.architecture import (
    VISION,
    WIDTH,
    Architecture,
    images,
    with_noise,
)


def _vision(name: str, model: str, config: str, **options: Any) -> Architecture:
    quick, side = bool(options.pop("quick", False)), options.get("image_size", 24)
    made = {**VISION, **options}
    return Architecture(name, model, config, made, images(side), ((1, 0), (2, 0), (5, 0)), quick)


def _network(name: str, model: str, config: str, side: int, **options: Any) -> Architecture:
    quick = bool(options.pop("quick", False))
    made = {"num_labels": 3, **options}
    return Architecture(name, model, config, made, images(side), ((1, 0), (2, 0), (5, 0)), quick)


ROWS: tuple[Architecture, ...] = (
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
    replace(_vision("vit-mae", "ViTMAEModel", "ViTMAEConfig"), inputs=with_noise),
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
)
