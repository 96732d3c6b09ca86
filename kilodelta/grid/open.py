"""Open a quantised model: a Hugging Face folder, a GGUF file or an ONNX graph."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
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
QUANTISATION = ("quantization_config", "compression_config")
"""Keys of `config.json` that say how a model is quantised."""
_PACKED = ("qweight", "weight_packed")
"""Last names of tensors that quantised models alone have."""
_DECISIVE: Mapping[str, tuple[str, str]] = {
    "gptq": ("checkpoint_format", "gptq"),
    "awq": ("version", "gemm"),
}
"""By method, the key (and its default) that says what codes mean where no shape does."""


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
        CheckpointError: it is none, in a layout that is not read, or its files contradict each
            other.
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
        raise _no_config(checkpoint)
    _require_agreement(checkpoint.folder, config)
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


def _no_config(checkpoint: Checkpoint) -> CheckpointError:
    """Say that nothing states how a model is quantised, and whether its tensors look so."""
    packed = next((n for n in checkpoint.names if n.rpartition(".")[2] in _PACKED), None)
    looks = "" if packed is None else f"; yet {packed} is a tensor of codes"
    return CheckpointError(
        f"{checkpoint.path} holds no quantised model: none of {', '.join(CONFIG_FILES)} there"
        f" has a quantisation configuration{looks}",
        fix="give the folder that the quantising tool wrote, with its configuration",
    )


def _require_agreement(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a folder whose files say different things of numbers that no shape tells apart.

    Raises:
        CheckpointError: they do.
    """
    method = str(config.get("quant_method"))
    if method not in _DECISIVE:
        return
    key, default = _DECISIVE[method]
    said = {
        name: str(other.get(key, default)).lower()
        for name, other in _configs(folder)
        if other.get("quant_method") == method
    }
    if len(set(said.values())) > 1:
        each = ", ".join(f"{value:.40} in {name}" for name, value in said.items())
        raise CheckpointError(
            f"{folder}: its configurations contradict each other: {key} is {each}",
            fix="delete the file that is of another checkpoint",
        )


def _config(folder: Path) -> Mapping[str, Any] | None:
    """Read a folder's quantisation configuration with its `quant_method`; None if there is none."""
    return next((config for _, config in _configs(folder)), None)


def _configs(folder: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every quantisation configuration of a folder, with its file's name."""
    for name in CONFIG_FILES:
        table = _table(folder / name)
        config = None if table is None else _of(name, table)
        if config is not None:
            yield name, config


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


def stated(table: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the quantisation configuration in a `config.json`; None if there is none.

    Some models that take more than text have it in the configuration of their text model.
    """
    for place in (table, table.get("text_config")):
        if isinstance(place, dict):
            found = next((place[key] for key in QUANTISATION if key in place), None)
            if isinstance(found, dict):
                return found
    return None


def _of(name: str, table: dict[str, Any]) -> Mapping[str, Any] | None:
    if name == "config.json":
        return stated(table)
    if name == "hf_quant_config.json":
        inner = table.get("quantization")
        return {"quant_method": "modelopt", **inner} if isinstance(inner, dict) else None
    method = "awq" if "w_bit" in table or "q_group_size" in table else "gptq"
    return {"quant_method": method, **table}
