"""Refuse what was given in a model's place, by what it is; `kilodelta.kinds` recognises it."""

from __future__ import annotations

from pathlib import Path

from kilodelta.errors import CheckpointError
from kilodelta.files.checkpoint import INDEX
from kilodelta.kinds import FileKind, kind_of_file, kind_of_folder

_DELTA = FileKind("a kilodelta file", "merge it first: kilodelta merge BASE FILE -o FOLDER")


def refuse_foreign(path: Path, role: str) -> None:
    """Refuse a model that is of a kind which cannot be compressed, by what it is.

    Args:
        path: a file or folder; what does not exist is left to whoever opens it.
        role: `BASE` or `TUNED`.

    Raises:
        CheckpointError: naming the kind and what to give instead.
    """
    kind = _kind(path, role)
    if kind is not None:
        fix = kind.fix
        if role == "BASE" and (path / "adapter_config.json").is_file():
            fix = "give the model that the adapter was trained on"
        raise CheckpointError(f"{role} {path} is {kind.what}", fix=fix)


def _kind(path: Path, role: str) -> FileKind | None:
    """Recognise a file or folder that holds no model; None where it may hold one."""
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(512)
        if path.suffix.lower() == ".kd":
            return _DELTA  # it is a safetensors file as well, and would open as a tiny model
        if role == "BASE" and path.suffix.lower() == ".gguf":
            return None  # its values are distilled against
        # A header of 640 to 1,407 bytes begins like a pickle; the brace tells them apart.
        return None if head[8:9] == b"{" else kind_of_file(path, head)
    if not path.is_dir():
        return None
    if (path / "adapter_config.json").is_file():
        return kind_of_folder(path)  # its weights are a safetensors file: not those of a model
    has_weights = any(path.glob("*.safetensors")) or (path / "snapshots").is_dir()
    # With an index but no weights, the reader names the shards that are missing.
    return None if has_weights or (path / INDEX).exists() else kind_of_folder(path)
