"""Open a quantised model: a Hugging Face folder, a GGUF file or an ONNX graph."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kilodelta.errors import CheckpointError
from kilodelta.files import canonical, plain
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.grid.model import QuantisedModel, described
from kilodelta.grid.recognise import weights

_LIMIT = 16 << 20
CONFIG_FILES = ("config.json", "hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Where configurations of quantised models lie; the first that has one counts."""


def is_quantised(path: str | os.PathLike[str] | Checkpoint | QuantisedModel) -> bool:
    """Return whether a path leads to a model that `open_quantised` would try to read.

    Example:
        >>> is_quantised("tests/golden/0.1.0/base.safetensors"), is_quantised("model.gguf")
        (False, True)
    """
    if isinstance(path, QuantisedModel):
        return True
    if isinstance(path, Checkpoint):
        return _config(path.folder) is not None if path.path.is_dir() else False
    place = Path(path)
    if place.suffix.lower() in (".gguf", ".onnx"):
        return True
    return place.is_dir() and _config(_folder(place)) is not None


def open_quantised(path: str | os.PathLike[str] | Checkpoint | QuantisedModel) -> QuantisedModel:
    """Open a quantised model; one that is open already is returned as it is.

    No weight is read before it is used.

    Args:
        path: a folder with `config.json` and safetensors files, a `.gguf` file or a `.onnx` file.

    Raises:
        CheckpointError: it is none, or in a layout that is not read.
        MissingPackageError: `gguf` or `onnx` is needed and not installed.
    """
    if isinstance(path, QuantisedModel):
        return path
    place = path.path if isinstance(path, Checkpoint) else Path(path)
    if place.suffix.lower() == ".gguf":
        from kilodelta.grid.gguf.file import open_gguf

        return open_gguf(place)
    if place.suffix.lower() == ".onnx":
        from kilodelta.grid.onnx_graph import open_onnx

        return open_onnx(place)
    checkpoint = Checkpoint.open(path)
    config = _config(checkpoint.folder)
    if config is None:
        raise CheckpointError(
            f"{checkpoint.path} holds no quantised model: none of {', '.join(CONFIG_FILES)} there"
            " has a quantisation configuration",
            fix="give the folder that the quantising tool wrote",
        )
    method, stored = weights(config, checkpoint)
    return described(checkpoint.path, method, config, stored, checkpoint)


def open_named(path: str | os.PathLike[str] | Checkpoint | QuantisedModel) -> QuantisedModel:
    """Open a quantised model by the names that Hugging Face's tools give its tensors.

    Only of a GGUF file they differ from those of `open_quantised`.

    Raises:
        CheckpointError: as `open_quantised`, or a GGUF file is of an architecture of which these
            names are not known.
        MissingPackageError: as `open_quantised`.
    """
    model = open_quantised(path)
    if model.method != "gguf" or model.renamed:
        return model
    from kilodelta.grid.gguf.names import by_hugging_face

    return by_hugging_face(model)


def _folder(place: Path) -> Path:
    """Follow a Hugging Face cache folder to its snapshot, as opening it would."""
    if (place / "config.json").exists() or not (place / "snapshots").is_dir():
        return place
    try:
        return Checkpoint.open(place).folder
    except CheckpointError:
        return place


def _config(folder: Path) -> Mapping[str, Any] | None:
    """Read a folder's quantisation configuration with its `quant_method`; None if there is none."""
    for name in CONFIG_FILES:
        table = _table(folder / name)
        config = None if table is None else _of(name, table)
        if config is not None:
            return config
    return None


def _table(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    with plain.explained(path, CheckpointError):
        text = plain.read_model_file(path, _LIMIT)
    try:
        table = canonical.loads_foreign(text)
    except canonical.NotCanonicalError:
        return None
    return table if isinstance(table, dict) else None


def _of(name: str, table: dict[str, Any]) -> Mapping[str, Any] | None:
    if name == "config.json":
        inner = table.get("quantization_config", table.get("compression_config"))
        return inner if isinstance(inner, dict) else None
    if name == "hf_quant_config.json":
        inner = table.get("quantization")
        return {"quant_method": "modelopt", **inner} if isinstance(inner, dict) else None
    method = "awq" if "w_bit" in table or "q_group_size" in table else "gptq"
    return {"quant_method": method, **table}
