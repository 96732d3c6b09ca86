"""Turn a quantised model into floats: tensors, or a folder that any tool of float models opens."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from kilodelta.errors import InputError
from kilodelta.files import safetensors, staging
from kilodelta.files.checkpoint import SINGLE, Checkpoint, read_config
from kilodelta.files.staging.sidecars import copy_sidecars
from kilodelta.files.tensor import RawTensor
from kilodelta.grid.gguf.configuration import describe
from kilodelta.grid.gguf.file import GgufSource
from kilodelta.grid.model import QuantisedModel
from kilodelta.grid.open import CONFIG_FILES, QUANTISATION


def dequantised(model: QuantisedModel, dtype: str = "float32") -> dict[str, RawTensor]:
    """Return a quantised model's tensors as floats: each weight one rounding of its exact value.

    Quantised weights come in `dtype`, everything else as it is stored.

    Args:
        model: the quantised model.
        dtype: "float32", or "float64", which holds every exact value.

    Raises:
        CheckpointError: the model cannot be read.
    """
    floats = {name: model.matrix(name).values().astype(dtype) for name in model.stored}
    return {
        **{name: RawTensor.of(values) for name, values in floats.items()},
        **{name: model.plain_raw(name) for name in model.plain},
    }


def float_bytes(model: QuantisedModel, dtype: str = "float32") -> int:
    """Count the bytes of `dequantised`."""
    weights = sum(prod(stored.shape) for stored in model.stored.values())
    plain = sum(model.plain_info(name).nbytes for name in model.plain)
    return weights * np.dtype(dtype).itemsize + plain


@contextmanager
def float_folder(
    model: QuantisedModel,
    *,
    beside: Path | None = None,
    dtype: str = "float32",
    changed: Mapping[str, RawTensor] = MappingProxyType({}),
) -> Iterator[Path]:
    """Yield a temporary folder with a quantised model's values, configuration and tokenizer.

    Its configuration does not say that the model is quantised.

    Args:
        model: opened from a folder, or from a GGUF file by Hugging Face's names (`open_named`).
        beside: a path in the folder to use, such as the output's: the copy takes four bytes per
            weight, or eight. The system's folder of temporary files by default.
        dtype: as for `dequantised`.
        changed: tensors that the copy has in the place of the model's, or besides them.

    Raises:
        CheckpointError: the model cannot be read.
        InputError: it is an ONNX graph, which has no configuration.
        OutputError: the copy cannot be written.
    """
    source = model.source
    if model.method == "onnx":
        raise InputError(
            f"{model.path} is one file without the config.json that says what its architecture is",
            fix="give the quantised model as a Hugging Face folder; into this file itself merges"
            " `kilodelta merge`",
        )
    place = (Path(tempfile.gettempdir()) if beside is None else beside.parent) / "values"
    values = "the values of the quantised base as floats"
    staging.require_room(staging.Need(path=place, nbytes=float_bytes(model, dtype), what=values))
    with staging.scratch(beside) as room:
        place = room / f"{model.path.name}-dequantised"
        place.mkdir()
        safetensors.write(place / SINGLE, {**dequantised(model, dtype), **changed})
        if isinstance(source, Checkpoint):
            _copy_config(source, place)
        elif isinstance(source, GgufSource):
            describe(source, place)
        yield place


def _copy_config(checkpoint: Checkpoint, place: Path) -> None:
    table = _without(read_config(checkpoint))
    if isinstance(table.get("text_config"), dict):
        table["text_config"] = _without(table["text_config"])
    if table:
        (place / "config.json").write_text(json.dumps(table))
    copy_sidecars(checkpoint.folder, place, frozenset(CONFIG_FILES))


def _without(table: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what says that a model is quantised."""
    return {key: value for key, value in table.items() if key not in QUANTISATION}
