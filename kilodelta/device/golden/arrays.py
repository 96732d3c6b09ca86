"""Inputs and outputs as `.npz` files, which is all that a device reads and writes."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kilodelta.errors import InputError
from kilodelta.files import staging


def read_npz(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    """Arrays by name.

    Raises:
        InputError: the file is missing, empty, or no `.npz` of plain arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise InputError(f"{path} does not exist", fix="check the path") from None
    except Exception as problem:  # a damaged zip raises whatever its reader raises
        raise InputError(
            f"{path} is not an .npz file of plain arrays: {problem}",
            fix="write it with numpy.savez(path, name=array)",
        ) from None
    if not found:
        raise InputError(f"{path} holds no arrays", fix="give one array an input")
    return found


def write_npz(path: str | os.PathLike[str], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays, in full or not at all.

    Raises:
        OutputError: they cannot be written.
    """
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    staging.write(Path(path), file.getvalue())


def summary(arrays: Mapping[str, NDArray[Any]]) -> list[dict[str, Any]]:
    """What outputs look like: name, dtype, shape, least, mean and largest value."""
    return [
        {
            "output": name,
            "dtype": str(array.dtype),
            "shape": list(array.shape),
            "least": float(array.min()) if array.size else None,
            "mean": float(array.mean(dtype=np.float64)) if array.size else None,
            "largest": float(array.max()) if array.size else None,
        }
        for name, array in arrays.items()
    ]
