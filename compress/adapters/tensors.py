"""An adapter's tensors, and a ledger of those that somebody has used.

A tensor that no reader asks for is an update that is lost without a word. So readers take tensors
through `AdapterTensors`, which remembers them, and the import ends with `require_all_used`.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from kilodelta.errors import CheckpointError, InputError
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.dtypes import FLOATS
from kilodelta.files.tensor import RawTensor, TensorInfo
from kilodelta.format.quantise import Floats


class AdapterTensors:
    """The tensors of an adapter's file, each marked when its values are taken."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.path = checkpoint.path
        self._used: set[str] = set()

    @property
    def names(self) -> tuple[str, ...]:
        """All keys, by UTF-8 bytes."""
        return self.checkpoint.names

    def __contains__(self, key: object) -> bool:
        return key in self.checkpoint

    def info(self, key: str) -> TensorInfo:
        """Describe a tensor, which does not count as using it.

        Raises:
            CheckpointError: it is missing.
        """
        return self.checkpoint.info(key)

    def raw(self, key: str) -> RawTensor:
        """Take a tensor as it is stored.

        Raises:
            CheckpointError: it is missing.
        """
        tensor = self.checkpoint.raw(key)
        self._used.add(key)
        return tensor

    def floats(self, key: str) -> Floats:
        """Take a tensor as float32.

        Raises:
            CheckpointError: it is missing or of no float type.
            InputError: it holds NaN or infinity.
        """
        values = floats(self.checkpoint, key)
        self._used.add(key)
        return values

    def use(self, keys: Iterable[str]) -> None:
        """Mark tensors whose values do not matter, such as a saved module's original weights."""
        self._used.update(keys)

    def require_all_used(self) -> None:
        """See that no tensor was passed over.

        Raises:
            InputError: one was, by its name.
        """
        for key in self.names:
            if key not in self._used:
                raise InputError(
                    f"{self.path} holds {key!r:.200} {self.info(key).shape}, which is no part of"
                    " the update that its configuration describes",
                    fix="save the adapter again with its own configuration, or leave this tensor"
                    " out if it belongs to something else",
                )


def floats(tensors: Checkpoint, key: str) -> Floats:
    """Read a float tensor as float32, in its shape; exact except for float64, which is rounded.

    Raises:
        CheckpointError: it is missing or of no float type.
        InputError: it holds NaN, infinity, or a float64 beyond float32's range.
    """
    info = tensors.info(key)
    if info.dtype not in FLOATS:
        raise CheckpointError(
            f"{tensors.path}: tensor {key} is {info.dtype}, not a float type",
            fix="give the adapter as its tool saved it",
        )
    with np.errstate(over="ignore"):
        values: Floats = FLOATS[info.dtype].widen(tensors.data(key)).reshape(info.shape)
    if not np.isfinite(values).all():
        raise InputError(
            f"{tensors.path}: tensor {key} holds NaN or infinity",
            fix="the adapter is broken: take an earlier checkpoint of it",
        )
    return values
