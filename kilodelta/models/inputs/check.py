"""Check batches against the model that is to take them, and refuse by name what does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kilodelta.errors import InputError, KiloDeltaError, one_line
from kilodelta.files.npz import ArrayHeader
from kilodelta.models.inputs.chance import repeatable_outputs
from kilodelta.models.loaded import Batch, LoadedModel
from kilodelta.models.media.processor_fit import stated_side
from kilodelta.models.quiet import quiet

TOKENS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
"""Inputs of text models: integers of shape (batch, tokens)."""
IMAGES = "pixel_values"
DECODER = "decoder_input_ids"
_LARGEST = 2**63 - 1
_PLAIN = {"f": np.float32, "i": np.int64, "u": np.int64}
"""By the kind of numpy's dtype: what a model computes with."""


def check(named: Mapping[str, Any], loaded: LoadedModel, origin: str) -> Batch:
    """Check a batch's names, types and shapes against a model, and convert it.

    Args:
        named: tensors or arrays by input name.
        loaded: the model that is to take them.
        origin: where they come from, for the error.

    Returns:
        The batch: floats as float32, integers as int64, booleans as they are.

    Raises:
        InputError: naming the input, what it is and what it should be.
    """
    _check_names(named, loaded, origin)
    values = {name: _array(name, value, origin) for name, value in named.items()}
    for name, value in values.items():
        _check_kind(name, _kind(value), tuple(value.shape), loaded, origin)
    batch = {name: _tensor(value) for name, value in values.items()}
    counts = {name: len(tensor) for name, tensor in batch.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise InputError(f"{origin}: rows differ: {listed}", fix="give as many of each")
    _check_lengths(batch, origin)
    for name, tensor in batch.items():
        _check_values(name, tensor, loaded, origin)
    return batch


def check_headers(headers: Mapping[str, ArrayHeader], loaded: LoadedModel, origin: str) -> None:
    """Check the arrays of an `.npz` file against a model before they are read.

    Raises:
        InputError: naming the array, what it is and what it should be.
    """
    _check_names(headers, loaded, origin)
    for name, header in headers.items():
        _check_kind(name, header.dtype.name, header.shape, loaded, origin)


def try_one(batch: Batch, loaded: LoadedModel, origin: str) -> None:
    """Compute with the first row of a batch, so that inputs are blamed before long work begins.

    A model may need more than one row; then the whole batch is tried.

    Raises:
        InputError: naming the inputs with types and shapes, and the model's own complaint; or
            the model draws random numbers.
    """
    first = {name: tensor[:1] for name, tensor in batch.items()}
    with torch.no_grad(), quiet():
        problem = _failure(first, loaded)
        if (
            problem is not None
            and len(next(iter(batch.values()))) > 1
            and _failure(batch, loaded) is None
        ):
            return
    if problem is not None:
        raise _cannot_compute(first, loaded, origin, problem)


def require_inputs(row: Batch, loaded: LoadedModel, origin: str) -> None:
    """Require the inputs without which a model computes nothing.

    Args:
        row: inputs by their names.
        loaded: the model.
        origin: where they come from, for the message.

    Raises:
        InputError: naming those that are not there, and what makes them.
    """
    lacking = ", ".join(name for name in loaded.required if name not in row)
    if lacking:
        raise InputError(
            f"{origin} makes {', '.join(row) or 'no inputs'}, and {loaded.source} wants {lacking}",
            fix="give sounds for input_features or input_values, images for pixel_values, texts for"
            f" input_ids; or a .npz file that holds {lacking}",
        )


def _cannot_compute(row: Batch, loaded: LoadedModel, origin: str, problem: Exception) -> InputError:
    """Name the cause where it shows in the inputs' lengths, else quote the model's complaint."""
    ids = row.get("input_ids")
    tokens = ids.shape[1] if ids is not None and ids.dim() == 2 else 0
    if loaded.max_length is not None and tokens > loaded.max_length:
        return InputError(
            f"{origin} holds rows of {tokens} tokens, and {loaded.source} has positions for "
            f"{loaded.max_length}",
            fix=f"cut the rows to {loaded.max_length} tokens",
        )
    side, pixels = stated_side(loaded), row.get("pixel_values")
    if side is not None and pixels is not None and tuple(pixels.shape[-2:]) != side:
        return InputError(
            f"{origin}: pixel_values are {pixels.shape[-2]} x {pixels.shape[-1]}, and "
            f"{loaded.source} takes images of {side[0]} x {side[1]}: {one_line(problem):.200}",
            fix="save the processor that the model was trained with into its folder, or give "
            "arrays of that size",
        )
    require_inputs(row, loaded, origin)  # texts for a model that hears, images for one that reads
    given = ", ".join(
        f"{name} {str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for name, t in row.items()
    )
    if "input_ids" in row and DECODER in loaded.accepts and DECODER not in row:
        return InputError(
            f"{origin} says nothing of what the decoder of {loaded.source} writes:"
            f" {one_line(problem)}",
            fix='write lines like {"text": "...", "target": "..."}, or {"text": "...", "target":'
            " null} for what the model itself writes",
        )
    return InputError(
        f"{origin}: {loaded.source} cannot compute with {given}: {one_line(problem)}",
        fix="give what the model was trained on: floats as float32 (pixels scaled and"
        " normalised), token ids as integers, within the sizes that it takes",
    )


def _check_lengths(batch: Batch, origin: str) -> None:
    """Require as many numbers for the tokens as tokens.

    Left to itself, transformers fills a mask up with zeros that is shorter than the tokens, and
    cuts a longer one, without a word.
    """
    ids = batch.get("input_ids")
    if ids is None or ids.dim() != 2:
        return
    for name in TOKENS[1:]:
        if name in batch and batch[name].dim() == 2 and batch[name].shape[1] != ids.shape[1]:
            raise InputError(
                f"{origin}: input_ids has {ids.shape[1]} tokens a row, {name} has "
                f"{batch[name].shape[1]}",
                fix=f"give {name} for the same tokens; what generation keeps between steps is no "
                "input here",
            )


def _failure(batch: Batch, loaded: LoadedModel) -> Exception | None:
    try:
        repeatable_outputs(loaded, batch)
    except KiloDeltaError:
        raise
    except Exception as error:  # a module's own code may raise anything
        return error
    return None


def _check_names(named: Mapping[str, Any], loaded: LoadedModel, origin: str) -> None:
    if not named:
        raise InputError(f"{origin} holds no arrays", fix=f"give {', '.join(loaded.required)}")
    absent = [name for name in loaded.required if name not in named]
    unknown = [name for name in named if name not in loaded.accepts]
    if absent or unknown:
        wrong = [f"lacks {name}" for name in absent] + [f"holds {name}" for name in unknown]
        raise InputError(
            f"{origin} {' and '.join(wrong)}",
            fix=f"the model takes {', '.join(loaded.accepts)} "
            f"and needs {', '.join(loaded.required)}",
        )


def _array(name: str, value: Any, origin: str) -> Any:
    """Take a tensor or numpy array of floats, integers or booleans, in its own dtype."""
    if isinstance(value, Tensor):
        if value.is_complex():
            raise _no_array(name, value.dtype, origin)
        return value.detach()
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise _no_array(name, array.dtype, origin)
    if array.dtype.kind == "u" and array.size and int(array.max()) > _LARGEST:
        raise InputError(
            f"{origin}: {name} holds {int(array.max())}, and models compute with int64",
            fix=f"give numbers up to {_LARGEST}",
        )
    return array


def _no_array(name: str, dtype: Any, origin: str) -> InputError:
    return InputError(
        f"{origin}: {name} is an array of {dtype}", fix="give floats, integers or booleans"
    )


def _kind(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.")


def _tensor(value: Any) -> Tensor:
    """Floats as float32, integers as int64, booleans as they are."""
    if not isinstance(value, Tensor):
        return torch.from_numpy(np.array(value, dtype=_PLAIN.get(value.dtype.kind, value.dtype)))
    if value.is_floating_point():
        return value.float()
    return value if value.dtype == torch.bool else value.long()


def _check_kind(
    name: str, dtype: str, shape: tuple[int, ...], loaded: LoadedModel, origin: str
) -> None:
    """Check one input's dtype and shape, of which a model's kind says what they should be."""
    wanted = _wanted(name, dtype, shape, loaded)
    if not shape or shape[0] == 0:
        wanted = wanted or "(batch, ...) with at least one row"
    elif 0 in shape and name in (*TOKENS, IMAGES):
        wanted = wanted or "rows of at least one number"
    if wanted is not None:
        raise InputError(f"{origin}: {name} has shape {shape} of {dtype}", fix=f"give {wanted}")


def _wanted(name: str, dtype: str, shape: tuple[int, ...], loaded: LoadedModel) -> str | None:
    """Say what the input should be where it is not that; None where it is right or not known."""
    is_float = "float" in dtype
    if loaded.kind == "text" and name in TOKENS:
        return None if len(shape) == 2 and not is_float else "integers of shape (batch, tokens)"
    if loaded.kind == "image" and name == IMAGES:
        channels = getattr(getattr(loaded.module, "config", None), "num_channels", 3)
        if len(shape) == 4 and is_float and shape[1] == channels:
            return None
        wanted = f"floats of shape (batch, {channels}, height, width)"
        raw = ", scaled and normalised as the model's image processor does"
        return wanted if is_float else wanted + raw
    return None


def _check_values(name: str, tensor: Tensor, loaded: LoadedModel, origin: str) -> None:
    if tensor.is_floating_point() and bool(tensor.isnan().any()):
        row = int(tensor.reshape(len(tensor), -1).isnan().any(1).nonzero()[0])
        raise InputError(f"{origin}: {name} holds NaN in row {row}", fix="remove or repair the row")
    size = _vocabulary(loaded) if loaded.kind == "text" and name == "input_ids" else None
    if size is not None and tensor.numel():
        low, high = int(tensor.min()), int(tensor.max())
        if low < 0 or high >= size:
            raise InputError(
                f"{origin}: {name} holds {low if low < 0 else high},"
                f" which is no token of {loaded.source}",
                fix=f"give ids from 0 to {size - 1}: those of this model's own tokenizer",
            )


def _vocabulary(loaded: LoadedModel) -> int | None:
    """Return how many rows the model's table of words has; None where it does not say."""
    try:
        table = loaded.module.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    count = getattr(table, "num_embeddings", None)
    return count if isinstance(count, int) else None
