"""Make up inputs for a model whose kind says what they look like, and say how long they may be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kilodelta.errors import InputError
from kilodelta.models.loaded import Batch, LoadedModel

_FIELDS = ("max_position_embeddings", "n_positions", "max_target_positions")
_USUAL_IMAGE = 224
"""Pixels a side for networks whose configuration states no size, such as ResNets."""


def example(loaded: LoadedModel, *, rows: int = 3, tokens: int = 7) -> Batch:
    """Make up a batch of random tokens without padding, or of random pixels; always the same.

    Args:
        loaded: a model that takes token ids alone, or images alone.
        rows: rows of the batch.
        tokens: tokens of each row; no matter for images.

    Returns:
        int64 `(rows, tokens)` for each input that the tokenizer makes (`input_ids` and
        `attention_mask` without one), or float32 `pixel_values` `(rows, channels, height, width)`.

    Raises:
        InputError: the model takes something else, so that nobody but the user knows its inputs.
    """
    chance = torch.Generator().manual_seed(0)
    if loaded.kind == "text":
        shape, words = (rows, tokens), vocabulary(loaded.module)
        return {name: _tokens(name, shape, words, chance) for name in _text_inputs(loaded)}
    size = example_image(getattr(loaded.module, "config", None))
    if loaded.kind == "image" and size is not None:
        return {"pixel_values": torch.randn(rows, *size, generator=chance)}
    raise InputError(
        f"{type(loaded.module).__name__} of {loaded.source} does not say what its inputs look "
        f"like; it takes {', '.join(loaded.accepts)}",
        fix="give inputs: a .npz file with one array per input, or package.module:function",
    )


def _text_inputs(loaded: LoadedModel) -> tuple[str, ...]:
    """Return what the tokenizer makes and the module takes."""
    stated = getattr(loaded.tokenizer, "model_input_names", ("input_ids", "attention_mask"))
    return tuple(name for name in loaded.accepts if name in stated)


def _tokens(name: str, shape: tuple[int, int], words: int, chance: torch.Generator) -> Tensor:
    if name == "input_ids":
        return torch.randint(words, shape, generator=chance)
    return torch.full(shape, int(name == "attention_mask"))


def vocabulary(module: Any) -> int:
    """Return how many tokens the module knows; 1, for token 0 alone, where it does not say."""
    try:
        return int(module.get_input_embeddings().num_embeddings)
    except (AttributeError, NotImplementedError):
        return 1


def example_image(config: Any) -> tuple[int, int, int] | None:
    """Return (channels, height, width) from a configuration; None where it does not say."""
    size = getattr(config, "image_size", _USUAL_IMAGE)
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    channels = getattr(config, "num_channels", None)
    if channels is None or len(sides) != 2 or not all(isinstance(s, int) for s in sides):
        return None
    return channels, sides[0], sides[1]


def longest_text(module: nn.Module) -> int | None:
    """Return the longest text in tokens that the position table of a transformers module takes.

    RoBERTa's relatives number positions from their padding index + 1 on, so that many rows of
    their table are never reached (`create_position_ids_from_input_ids` in transformers).

    Args:
        module: any module; None is returned for one without a transformers configuration.
    """
    stated = _stated(getattr(module, "config", None))
    if stated is None:
        return None
    return stated - max((skipped(table) for table in _tables(module)), default=0)


def skipped(table: nn.Embedding) -> int:
    """Return how many rows of a position table come before that of the first token."""
    return 0 if table.padding_idx is None else table.padding_idx + 1


def _stated(config: Any) -> int | None:
    """Return the positions that a configuration states, its text model's where it has one."""
    if config is None:
        return None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for owner in (text, config):
        for field in _FIELDS:
            value = getattr(owner, field, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _tables(module: nn.Module) -> list[nn.Embedding]:
    return [
        table
        for name, table in module.named_modules()
        if isinstance(table, nn.Embedding) and name.endswith("position_embeddings")
    ]
