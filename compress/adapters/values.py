"""An adapter's tensors as numbers."""

from __future__ import annotations

import numpy as np

from kilodelta.errors import CheckpointError, InputError
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.coefficients import Floats

_VIEWS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def floats(tensors: Checkpoint, key: str) -> Floats:
    """A float tensor as float32; exact but for float64.

    Raises:
        CheckpointError: it is missing or of no float type.
        InputError: it holds NaN or infinity.
    """
    info = tensors.info(key)
    if info.dtype not in _VIEWS:
        raise CheckpointError(
            f"{tensors.path}: tensor {key} is {info.dtype}, not a float type",
            fix="give the adapter as its tool saved it",
        )
    raw = tensors.data(key).copy().view(_VIEWS[info.dtype]).reshape(info.shape)
    wide = (raw.astype(np.uint32) << 16).view(np.float32) if info.dtype == "BF16" else raw
    found = wide.astype(np.float32)
    if not np.isfinite(found).all():
        raise InputError(
            f"{tensors.path}: tensor {key} holds NaN or infinity",
            fix="the adapter is broken: take an earlier checkpoint of it",
        )
    return found
