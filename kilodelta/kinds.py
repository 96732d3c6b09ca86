"""Recognise files and folders that are given where a model or a `.kd` file is wanted.

A header that "claims 7306087006917566499 bytes" is true of a text file and helps nobody; that it is
a text file, and where texts go, does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_SAVE = (
    "where you trust the file, load the model with transformers and save it with "
    "model.save_pretrained(FOLDER), which writes .safetensors; give that folder"
)
_PICKLE = "a PyTorch pickle, which may run code when it is read"
_HEAD = 512


@dataclass(frozen=True)
class FileKind:
    """What a file is, to follow "it is", and what to do instead."""

    what: str
    fix: str


_GGUF = FileKind(
    "a GGUF file of llama.cpp, whose weights are quantised",
    "give the checkpoint that it was converted from; kilodelta export-gguf writes adapters for it",
)
_ONNX = FileKind(
    "an ONNX file, a graph without the checkpoint's names",
    "give the checkpoint that it was exported from; kilodelta verify proves an export's folder",
)
_MAGIC: tuple[tuple[bytes, FileKind], ...] = (
    (b"GGUF", _GGUF),
    (
        b"\x93NUMPY",
        FileKind("a .npy file of one array", "inputs are .npz files, given as --inputs"),
    ),
    (b"\x89HDF", FileKind("a Keras or HDF5 file", _SAVE)),
    (b"\x1f\x8b", FileKind("a gzip archive", "unpack it first")),
    (b"%PDF", FileKind("a PDF file", "give a .safetensors file or a model folder")),
    *((bytes([0x80, version]), FileKind(_PICKLE, _SAVE)) for version in (2, 3, 4, 5)),
)
_ZIP = FileKind("a ZIP archive, as PyTorch and numpy write them", _SAVE)
_SUFFIXES = {
    ".gguf": _GGUF,
    ".onnx": _ONNX,
    ".onnx_adapter": FileKind(
        "an adapter file of ONNX Runtime", "give the .kd file it was made from"
    ),
    ".npz": FileKind("an .npz file of arrays", "inputs are given as --inputs"),
    ".tflite": FileKind("a TensorFlow Lite file", "give the model that it was converted from"),
    ".engine": FileKind("a TensorRT engine", "kilodelta verify proves an export's folder"),
    ".plan": FileKind("a TensorRT engine", "kilodelta verify proves an export's folder"),
    ".h5": FileKind("a Keras or HDF5 file", _SAVE),
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt", ".pkl"), FileKind(_PICKLE, _SAVE)),
}
_TEXTS = {
    ".json": FileKind(
        "a JSON file", "give the folder that it lies in, or a .safetensors or .kd file"
    ),
    ".toml": FileKind("a TOML file", "kilodelta fleet reads those"),
}
_TEXT = FileKind(
    "a text file", "texts are given as --inputs, to compress, export, verify or release"
)
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+\Z")


def kind_of_file(path: Path, head: bytes) -> FileKind | None:
    r"""Recognise a file that is no safetensors file by its first bytes, then by its name.

    Args:
        path: the file.
        head: its first bytes, some hundred or all.

    Example:
        >>> kind_of_file(Path("model.bin"), b"GGUF\x03\x00").what
        'a GGUF file of llama.cpp, whose weights are quantised'
    """
    suffix = path.suffix.lower()
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if suffix in _SUFFIXES:
        return _SUFFIXES[suffix]
    if head.startswith(b"PK\x03\x04"):
        return _ZIP
    return _TEXTS.get(suffix, _TEXT) if _is_text(head[:_HEAD]) else None


def _is_text(head: bytes) -> bool:
    """Return whether bytes are UTF-8 text, perhaps cut in its last character, without controls."""
    text = head.decode("utf-8", "ignore")
    controls = sum(not (c.isprintable() or c.isspace()) for c in text)
    return bool(head) and not controls and len(text.encode()) >= len(head) - 3


def kind_of_folder(folder: Path) -> FileKind | None:
    """Recognise a folder that holds no model in safetensors files.

    Raises:
        OSError: it cannot be read.
    """
    if (folder / "adapter_config.json").is_file():
        return FileKind(
            "the folder of a PEFT adapter, not of a model",
            f"kilodelta import {folder} --base BASE -o task.kd",
        )
    if (folder / "bundle.json").is_file():
        return FileKind("a device folder", f"kilodelta status {folder}")
    if (folder / "manifest.json").is_file():
        return FileKind("the folder of an export", f"kilodelta verify BASE FILE {folder}")
    for name in sorted(entry.name for entry in folder.iterdir()):
        kind = _SUFFIXES.get(Path(name).suffix.lower())
        if kind is not None:
            return FileKind(f"a folder with {name}, {kind.what}", kind.fix)
    return None


def looks_like_hub_id(path: str) -> bool:
    """Return whether a path that is not there is written like a model of the Hugging Face hub.

    Example:
        >>> looks_like_hub_id("org/name"), looks_like_hub_id("./org/name"), looks_like_hub_id("x")
        (True, False, False)
    """
    is_file_name = path.endswith((".safetensors", ".kd", ".json"))  # a mistyped path, surely
    return _HUB.match(path) is not None and not is_file_name and not Path(path).parent.exists()
