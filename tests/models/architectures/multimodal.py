"""Models of several kinds of input: images or videos with texts, and documents with places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.models.architectures.architecture import (
    LENGTH,
    TEXT,
    VISION,
    WIDTH,
    WORDS,
    Architecture,
    Batch,
    boxes,
    images,
    patches_and_words,
    pictures_and_words,
    tokens,
)

_USUAL = ((1, 5), (2, 9), (3, 17))
_FIXED = ((2, 5), (4, 9), (4, 17))
"""Where the model's code fixes the number of rows: at 2 in an export, at 4 in a device folder."""
_PICTURE = WORDS - 1
"""The token in whose place a patch of the picture stands."""
_PATCHES = 9
"""Of a picture of 24 x 24 pixels, at 8 x 8 each."""
_VISION_TOWER = {k: v for k, v in VISION.items() if k != "num_labels"}


def videos(frames: int, side: int) -> Callable[[int, int], Batch]:
    """Videos of one size; the second number is not used."""

    def make(rows: int, size: int) -> Batch:
        chance = torch.Generator().manual_seed(rows + size)
        return {"pixel_values": torch.randn(rows, frames, 3, side, side, generator=chance)}

    return make


def video_and_words(rows: int, size: int) -> Batch:
    """Videos of two frames, and texts."""
    return {**tokens(rows, size), **videos(2, 24)(rows, size)}


def pictures_in_words(rows: int, size: int) -> Batch:
    """Texts, each with the places of one picture's patches after its first token."""
    batch = tokens(rows, size + _PATCHES)
    batch["input_ids"].clamp_(max=_PICTURE - 1)
    batch["input_ids"][:, 1 : 1 + _PATCHES] = _PICTURE
    return {**batch, **images(24)(rows, size)}


def documents(rows: int, size: int) -> Batch:
    """Words with their boxes, and the picture of the page."""
    return {**boxes(rows, size), **images(24)(rows, size)}


def _pair(name: str, model: str, config: str, text: dict[str, Any], **options: Any) -> Architecture:
    """A row of two towers."""
    inputs = options.pop("inputs", pictures_and_words(24))
    sizes = options.pop("sizes", _USUAL)
    vision = {**_VISION_TOWER, **options.pop("vision", {})}
    towers = {"text_config": {**TEXT, **text}, "vision_config": vision}
    return Architecture(name, model, config, {**towers, **options}, inputs, sizes)


ROWS: tuple[Architecture, ...] = (
    _pair(
        "altclip",
        "AltCLIPModel",
        "AltCLIPConfig",
        {"project_dim": WIDTH, "max_position_embeddings": LENGTH + 2},
        projection_dim=8,
    ),
    _pair("chinese-clip", "ChineseCLIPModel", "ChineseCLIPConfig", {}, projection_dim=8),
    _pair(
        "clipseg",
        "CLIPSegForImageSegmentation",
        "CLIPSegConfig",
        {},
        projection_dim=WIDTH,
        extract_layers=[0],
        reduce_dim=8,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=24,
        sizes=_FIXED,
    ),
    _pair(
        "groupvit",
        "GroupViTModel",
        "GroupViTConfig",
        {},
        vision={"depths": [1, 1], "num_group_tokens": [4, 0], "num_output_groups": [4, 2]},
        projection_dim=8,
        projection_intermediate_dim=24,
    ),
    _pair("owlvit", "OwlViTForObjectDetection", "OwlViTConfig", {}, projection_dim=WIDTH),
    _pair(
        "x-clip",
        "XCLIPModel",
        "XCLIPConfig",
        {},
        inputs=video_and_words,
        vision={
            "num_frames": 2,
            "mit_hidden_size": WIDTH,
            "mit_intermediate_size": 24,
            "mit_num_hidden_layers": 1,
            "mit_num_attention_heads": 2,
        },
        projection_dim=WIDTH,
        prompt_layers=1,
        prompt_num_attention_heads=2,
    ),
    _pair(
        "blip",
        "BlipForImageTextRetrieval",
        "BlipConfig",
        {"encoder_hidden_size": WIDTH, "projection_dim": 8},
        projection_dim=8,
        image_text_hidden_size=8,
    ),
    Architecture(
        "vilt",
        "ViltForImagesAndTextClassification",
        "ViltConfig",
        {**TEXT, **VISION, "num_images": 1},
        pictures_and_words(24),
    ),
    # The way on that ViLT's refusal names: it draws which patches it sees, unless it is given them.
    Architecture(
        "vilt-embeds",
        "ViltForQuestionAnswering",
        "ViltConfig",
        {**TEXT, **VISION},
        patches_and_words,
    ),
    Architecture(
        "git",
        "GitForCausalLM",
        "GitConfig",
        {**TEXT, "vision_config": _VISION_TOWER},
        pictures_and_words(24),
    ),
    Architecture(
        "layoutlmv3",
        "LayoutLMv3ForTokenClassification",
        "LayoutLMv3Config",
        {
            **TEXT,
            "input_size": 24,
            "patch_size": 8,
            "num_labels": 3,
            "max_position_embeddings": LENGTH + 2,
            "coordinate_size": 3,
            "shape_size": 2,
            "max_2d_position_embeddings": 1001,
            "rel_pos_bins": 8,
            "rel_2d_pos_bins": 8,
        },
        documents,
    ),
    Architecture(
        "llava",
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama", **TEXT, "num_key_value_heads": 2},
            "vision_config": {
                "model_type": "clip_vision_model",
                **_VISION_TOWER,
                "projection_dim": 8,
            },
            "image_token_index": _PICTURE,
            "vision_feature_layer": -1,
        },
        pictures_in_words,
        _FIXED,
    ),
    Architecture(
        "videomae",
        "VideoMAEForVideoClassification",
        "VideoMAEConfig",
        {**VISION, "num_frames": 4, "tubelet_size": 2},
        videos(4, 24),
        ((1, 0), (2, 0), (5, 0)),
    ),
    Architecture(
        "timesformer",
        "TimesformerForVideoClassification",
        "TimesformerConfig",
        {**VISION, "num_frames": 2},
        videos(2, 24),
        ((1, 0), (2, 0), (5, 0)),
    ),
    Architecture(
        "vivit",
        "VivitForVideoClassification",
        "VivitConfig",
        {**VISION, "num_frames": 4, "tubelet_size": [2, 8, 8]},
        videos(4, 24),
        ((1, 0), (2, 0), (5, 0)),
    ),
    Architecture(
        "detr",
        "DetrForObjectDetection",
        "DetrConfig",
        {
            "d_model": WIDTH,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "num_queries": 4,
            "num_labels": 3,
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "backbone_config": {
                "model_type": "resnet",
                "embedding_size": 8,
                "hidden_sizes": [8, 8, 16, 16],
                "depths": [1, 1, 1, 1],
                "layer_type": "basic",
                "out_features": ["stage4"],
            },
        },
        images(64),
        ((1, 0), (2, 0), (5, 0)),
    ),
)
