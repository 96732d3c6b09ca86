"""Name what was given in a model's place: a file of another kind, and the command that takes it."""

from __future__ import annotations

from pathlib import Path

from kilodelta.errors import CheckpointError

_SAVE = "save the model with save_pretrained(..., safe_serialization=True) and give that folder"
_KINDS: dict[str, tuple[str, str]] = {
    ".gguf": ("a GGUF file, whose weights are quantised", "give the model it was converted from"),
    ".pth": ("a PyTorch pickle, which may run code when it is read", _SAVE),
    ".pt": ("a PyTorch pickle, which may run code when it is read", _SAVE),
    ".bin": ("a PyTorch pickle, which may run code when it is read", _SAVE),
    ".ckpt": ("a training checkpoint, which may run code when it is read", _SAVE),
    ".onnx": ("an ONNX file, a graph without the checkpoint's names", "give the model it was"
              " exported from"),
    ".h5": ("a Keras file", _SAVE),
    ".tflite": ("a TensorFlow Lite file", "give the model it was converted from"),
    ".engine": ("a TensorRT engine", "give the model it was built from"),
    ".kd": ("a kilodelta file", "merge it first: kilodelta merge BASE FILE -o FOLDER"),
    ".npz": ("a file of arrays", "inputs go to --inputs"),
}  # fmt: skip


def refuse_foreign(path: Path, role: str) -> None:
    """Refuse a model that is of a kind which cannot be compressed, by what it is.

    Args:
        path: what was given.
        role: `BASE` or `TUNED`.

    Raises:
        CheckpointError: naming the kind and what to give instead.
    """
    if path.is_file():
        kind = ".gguf" if _begins_with(path, b"GGUF") else path.suffix.lower()
        if kind in _KINDS:
            what, fix = _KINDS[kind]
            raise CheckpointError(f"{role} {path} is {what}", fix=fix)
    if (path / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{role} {path} is a PEFT adapter, not a model",
            fix=f"kilodelta import {path} --base BASE -o task.kd"
            if role == "TUNED"
            else "give the model that the adapter was trained on",
        )
    if path.is_dir() and not any(path.glob("*.safetensors")) and not (path / "snapshots").is_dir():
        _refuse_folder(path, role)


def _refuse_folder(path: Path, role: str) -> None:
    """Refuse a folder whose weights are of another kind."""
    if (path / "bundle.json").is_file():
        raise CheckpointError(
            f"{role} {path} is a device folder", fix="give the model that it was made from"
        )
    for suffix, (what, fix) in _KINDS.items():
        files = sorted(path.glob(f"*{suffix}"))
        if files and not (path / "model.safetensors.index.json").exists():
            raise CheckpointError(f"{role} {path} holds {files[0].name}, {what}", fix=fix)


def _begins_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic
