"""Name what was given as an adapter and is none: a file or folder of another tool."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kilodelta.errors import CheckpointError, InputError
from kilodelta.files import plain
from kilodelta.files.checkpoint import INDEX
from kilodelta.kinds import kind_of_file

CONFIG = "adapter_config.json"
CHECKPOINTS = frozenset({".bin", ".ckpt", ".pt", ".pth", ".safetensors"})
"""Suffixes of files that may be a checkpoint of the official NOLA code."""

_OF_PEFT = frozenset({"adapter_model.bin", "adapter_model.safetensors", CONFIG})
_MODEL = ("a whole model, no adapter", "kilodelta compress BASE TUNED -o FILE takes a fine-tune")
_DIFFUSERS = (
    "a LoRA of Hugging Face diffusers",
    "load it with diffusers, save the model after fuse_lora, and run kilodelta compress",
)
_FOLDERS: Mapping[str, tuple[str, str]] = {
    "pytorch_lora_weights.safetensors": _DIFFUSERS,
    "adapters.safetensors": (
        "an adapter of MLX",
        "fuse it with mlx_lm.fuse, and run kilodelta compress BASE FUSED -o FILE",
    ),
    "adapter_model.pt": (
        "an adapter that was saved without PEFT's configuration",
        f"save it with PEFT's save_pretrained, which writes {CONFIG}",
    ),
    "model.safetensors": _MODEL,
    INDEX: _MODEL,
}
"""What a folder without PEFT's configuration is, by a file in it."""


def refuse_foreign(path: Path) -> None:
    """Refuse what is no adapter that can be read, by what it is.

    Raises:
        CheckpointError: there is nothing at that path, or no regular file.
        InputError: it is a file or folder of another kind.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist", fix="check the path of the adapter")
    if not path.is_dir():
        _refuse_file(path)
    elif not (path / CONFIG).exists():
        for name, (what, fix) in _FOLDERS.items():
            if (path / name).exists():
                raise InputError(f"{path} is {what}", fix=fix)


def _refuse_file(path: Path) -> None:
    if path.name in _OF_PEFT:
        raise InputError(
            f"{path} is one file of a PEFT adapter", fix=f"give its folder: {path.parent}"
        )
    if path.name in _FOLDERS:
        what, fix = _FOLDERS[path.name]
        raise InputError(f"{path} is {what}", fix=fix)
    if path.suffix == ".kd":
        raise InputError(
            f"{path} is a .kd file already",
            fix=f"kilodelta inspect {path}, or kilodelta merge BASE {path} -o OUT",
        )
    with plain.explained(path, CheckpointError), plain.open_reader(path, follow=True) as file:
        head = file.read(512)
    kind = kind_of_file(path, head)
    if kind is not None and path.suffix.lower() not in CHECKPOINTS:
        raise InputError(
            f"{path} is {kind.what}",
            fix="give the folder that PEFT's save_pretrained wrote, from which it was made",
        )
