"""An adapter's tensors as numbers."""

from __future__ import annotations

import numpy as np

from kilodelta.errors import CheckpointError, InputError
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.dtypes import FLOATS
from kilodelta.format.quantise import Floats


def floats(tensors: Checkpoint, key: str) -> Floats:
    """A float tensor as float32; exact but for float64.

    Raises:
        CheckpointError: it is missing or of no float type.
        InputError: it holds NaN or infinity.
    """
    info = tensors.info(key)
    if info.dtype not in FLOATS:
        raise CheckpointError(
            f"{tensors.path}: tensor {key} is {info.dtype}, not a float type",
            fix="give the adapter as its tool saved it",
        )
    found = FLOATS[info.dtype].widen(tensors.data(key)).reshape(info.shape)
    if not np.isfinite(found).all():
        raise InputError(
            f"{tensors.path}: tensor {key} holds NaN or infinity",
            fix="the adapter is broken: take an earlier checkpoint of it",
        )
    return found
