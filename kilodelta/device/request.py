"""Hold a request's inputs against those that a bundle was tried with, before a runtime sees them.

A runtime complains late and of its own nodes, or not at all: ONNX Runtime takes a negative id for
one that is counted from the end of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from kilodelta.device.golden import golden
from kilodelta.errors import InputError
from kilodelta.files import npz
from kilodelta.files.npz import ArrayHeader
from kilodelta.verify.runners.runner import Batch

ALONG_TOKENS = ("attention_mask", "token_type_ids", "position_ids")
"""Inputs with one number for each token of `input_ids`."""


def read_known(base: Path) -> dict[str, ArrayHeader]:
    """Read the dtypes and shapes of the golden inputs, by name; empty where they cannot be read.

    A device whose golden values are damaged takes no fine-tune, and goes on serving.

    Args:
        base: the folder `base/` of a device folder.
    """
    try:
        headers = npz.read_headers(base / golden.FILE)
    except InputError:
        return {}
    prefix = golden.INPUT
    return {n.removeprefix(prefix): h for n, h in headers.items() if n.startswith(prefix)}


def check_request(batch: Batch, known: Mapping[str, ArrayHeader]) -> None:
    """Check names, axes and ids of a request.

    Args:
        batch: its inputs by name.
        known: inputs that the model takes, as `read_known` returns them; empty checks nothing.

    Raises:
        InputError: an input is missing, would not be looked at, has other axes or another number
            of rows or tokens than the rest, or holds a negative id; says which.

    Example:
        >>> header = ArrayHeader(dtype=np.dtype(np.int64), shape=(2, 5), fortran=False)
        >>> check_request({"input_ids": np.zeros((1, 9), np.int64)}, {"input_ids": header})
    """
    if not known:
        return
    takes = f"the model takes {', '.join(known)}"
    if missing := [name for name in known if name not in batch]:
        raise InputError(f"the inputs lack {', '.join(missing)}", fix=takes)
    for name, values in batch.items():
        if name in known:
            _check_axes(name, np.shape(values), known[name])
        elif np.any(np.asarray(values)):  # zeros, as tokenizers add them, change nothing
            raise InputError(f"{name} is no input of this model: it would be ignored", fix=takes)
    _check_counts(batch, known)
    for name in known:
        if name.endswith("_ids") and np.any(low := np.asarray(batch[name]) < 0):
            raise InputError(
                f"input {name} holds {np.asarray(batch[name])[low].flat[0]}",
                fix="give ids from 0 on, as the model's own tokenizer does",
            )


def _check_axes(name: str, shape: tuple[int, ...], header: ArrayHeader) -> None:
    if len(shape) != len(header.shape) or 0 in shape[1:]:
        raise InputError(
            f"input {name} has shape {shape}",
            fix=f"give {len(header.shape)} axes with the rows first, such as {header.shape}",
        )


def _check_counts(batch: Batch, known: Mapping[str, ArrayHeader]) -> None:
    rows = {name: len(batch[name]) for name in known if known[name].shape}
    if len({known[name].shape[0] for name in rows}) == 1 and len(set(rows.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in rows.items())
        raise InputError(f"rows differ: {listed}", fix="give as many of each")
    tokens = np.shape(batch["input_ids"])[1:] if "input_ids" in known else ()
    for name in ALONG_TOKENS:
        if name in known and len(tokens) == 1 and known[name].shape == known["input_ids"].shape:
            count = np.shape(batch[name])[1]
            if count != tokens[0]:
                raise InputError(
                    f"input_ids has {tokens[0]} tokens a row, {name} has {count}",
                    fix=f"give {name} for the same tokens",
                )
