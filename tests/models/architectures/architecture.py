"""One row of the table, the inputs that rows are given, and the sizes that they share."""

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
        model: the class of transformers; of a plain module, what it is made of.
        config: the class of its configuration; empty for a plain module, which the function of its
            name in `modules` builds.
        options: what the configuration is made with.
        inputs: makes a batch of so many rows and of a size that the kind of input explains.
        sizes: rows and sizes to compare at.
        quick: compressed and merged in CI as well, not only with `--slow`.
        whole: tensors of the base that its file stores whole, for adapter mode's `--whole`.
    """

    name: str
    model: str
    config: str
    options: Mapping[str, Any]
    inputs: Callable[[int, int], Batch]
    sizes: tuple[tuple[int, int], ...] = ((1, 5), (2, 9), (3, 17))
    quick: bool = False
    whole: tuple[str, ...] = ()


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


def with_noise(rows: int, size: int) -> Batch:
    """Images of 3 x 3 patches, and the numbers by which ViT-MAE chooses the ones that it sees."""
    chance = torch.Generator().manual_seed(rows + size)
    return {**images(24)(rows, size), "noise": torch.rand(rows, 9, generator=chance)}


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


def spectra(rows: int, size: int) -> Batch:
    """Frames of eight mel features, four for each unit of size, and target tokens."""
    chance = torch.Generator().manual_seed(rows + size)
    return {
        "input_features": torch.randn(rows, 4 * size, 8, generator=chance),
        "decoder_input_ids": tokens(rows, max(2, size // 2))["input_ids"],
    }


def patches_and_words(rows: int, size: int) -> Batch:
    """Texts, and the embeddings of an image's nine patches after that of its class token."""
    chance = torch.Generator().manual_seed(rows + size)
    return {
        **tokens(rows, size),
        "image_embeds": torch.randn(rows, 10, WIDTH, generator=chance),
        "pixel_mask": torch.ones(rows, 1, 10, dtype=torch.int64),
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


TEXT: dict[str, Any] = {
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
VISION: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 24,
    "patch_size": 8,
    "num_labels": 3,
}


def text(name: str, model: str, config: str, **options: Any) -> Architecture:
    """A row of a text model; options are those of `TEXT`, and others in their place."""
    quick = bool(options.pop("quick", False))
    inputs = options.pop("inputs", tokens)
    return Architecture(name, model, config, {**TEXT, **options}, inputs, quick=quick)
