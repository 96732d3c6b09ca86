"""Inputs made up for tracing and timing, and the axes of inputs that may vary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kilodelta.errors import InputError
from kilodelta.models.loaded import Batch, LoadedModel

BATCH, SEQUENCE = "batch", "sequence"
"""The names of the axes that vary."""


def example(loaded: LoadedModel, *, rows: int = 3, tokens: int = 7) -> Batch:
    """A batch the model takes: token 0 everywhere, every position counting; or black images.

    Raises:
        InputError: nothing is known about the model's inputs.
    """
    if loaded.kind == "text":
        return {name: _tokens(name, (rows, tokens)) for name in _text_inputs(loaded)}
    size = _image_size(getattr(loaded.module, "config", None))
    if loaded.kind == "image" and size is not None:
        return {"pixel_values": torch.zeros(rows, *size)}
    raise InputError(
        f"{loaded.source} does not say what its inputs look like",
        fix="give inputs: a .npz file or package.module:function",
    )


def axes(loaded: LoadedModel, name: str, tensor: Tensor) -> dict[int, str]:
    """Which axes of an input vary, by name: the first is the batch; the second of a matrix of
    integers is the sequence."""
    is_tokens = tensor.ndim == 2 and not tensor.is_floating_point()
    return {0: BATCH, 1: SEQUENCE} if is_tokens and loaded.kind != "image" else {0: BATCH}


def _text_inputs(loaded: LoadedModel) -> tuple[str, ...]:
    """What the tokenizer puts out and the module takes."""
    stated = getattr(loaded.tokenizer, "model_input_names", ("input_ids", "attention_mask"))
    return tuple(name for name in loaded.accepts if name in stated)


def _tokens(name: str, shape: tuple[int, int]) -> Tensor:
    return torch.full(shape, int(name == "attention_mask"))


def _image_size(config: Any) -> tuple[int, int, int] | None:
    """(channels, height, width) from a configuration; None where it does not say.

    Networks without a fixed size, such as ResNets, are shown the usual 224.
    """
    size = getattr(config, "image_size", 224)
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    channels = getattr(config, "num_channels", None)
    return None if channels is None else (channels, *sides[:2])
