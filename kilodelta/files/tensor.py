"""Tensors that a file stores whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kilodelta.errors import InputError
from kilodelta.files import dtypes


@dataclass(frozen=True, kw_only=True)
class Extra:
    """A tensor stored whole: its safetensors dtype, shape and raw bytes, uint8 (n,)."""

    dtype: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]


def extra(value: Any) -> Extra:
    """A tensor to be stored whole, from a numpy array or torch tensor."""
    from kilodelta.files.identity import raw

    dtype, shape, data = raw(value)
    if dtype not in dtypes.BITS:
        raise InputError(f"{dtype} cannot be stored", fix="convert the tensor first")
    return Extra(dtype=dtype, shape=shape, data=data.copy())
