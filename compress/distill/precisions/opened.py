"""Open a quantised base: its exact values as a float folder, for as long as a compression runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kilodelta.files import safetensors, staging
from kilodelta.files.checkpoint import INDEX, SINGLE
from kilodelta.grid.model import QuantisedModel
from kilodelta.grid.open import CONFIG_FILES, is_quantised, open_quantised
from kilodelta.grid.quantise import dequantised
from kilodelta.models.layer_names import read_config

SMALL = 64 << 20
"""Bytes up to which a file beside the weights (a tokenizer) is copied."""


@contextmanager
def float_copy(base: Path, out: Path) -> Iterator[tuple[Path, QuantisedModel | None]]:
    """Give a base as a float model: itself, or a temporary copy of a quantised one's values.

    The copy holds each quantised weight as float32, one rounding of its exact value, and everything
    else as it is stored; it lies beside `out` and takes four bytes per weight.

    Args:
        base: a folder or file.
        out: the file that is to be written.

    Yields:
        The float model's place, and the quantised model; None where the base is none.

    Raises:
        CheckpointError: the base cannot be read.
        OutputError: the copy cannot be written.
    """
    if not is_quantised(base):
        yield base, None
        return
    model = open_quantised(base)
    with staging.scratch(out) as room:
        place = room / f"{model.path.name}-dequantised"
        place.mkdir()
        safetensors.write(place / SINGLE, dequantised(model))
        _copy_config(model, place)
        yield place, model


def _copy_config(model: QuantisedModel, place: Path) -> None:
    """Copy configuration and tokenizer; the copy does not say that it is quantised."""
    checkpoint: Any = model.source  # a folder: GGUF and ONNX files are refused as BASE
    table = dict(read_config(checkpoint))
    for key in ("quantization_config", "compression_config"):
        table.pop(key, None)
    if table:
        (place / "config.json").write_text(json.dumps(table))
    for path in sorted(checkpoint.folder.iterdir()):
        left_out = path.name in (*CONFIG_FILES, INDEX) or path.suffix in (".safetensors", ".kd")
        if not left_out and path.is_file() and path.stat().st_size <= SMALL:
            shutil.copyfile(path, place / path.name)


def kinds_of(model: QuantisedModel) -> tuple[str, ...]:
    """Name the layouts of a quantised model's weights, sorted, each once."""
    return tuple(sorted({weight.layout.name for weight in model.stored.values()}))
