"""Find the quantised weights of a GGUF file, whose types are those that the `gguf` package names.

Names are the file's own (`blk.0.attn_q.weight`); of Llama's queries and keys the rows are in the
order in which llama.cpp wants them, and stay so. `gguf_names` gives the same file the names and
rows that Hugging Face's tools use.
"""

from __future__ import annotations

import math
from pathlib import Path

from kilodelta.errors import CheckpointError, require
from kilodelta.files.checkpoint import in_name_order
from kilodelta.files.source import SourceFile
from kilodelta.files.tensor import RawTensor, TensorInfo
from kilodelta.grid.gguf.header import GgufTensor, read_header
from kilodelta.grid.layouts.gguf_blocks import TYPES, GgufBlocks
from kilodelta.grid.model import QuantisedModel, Stored, described

_PLAIN = {"F32": "F32", "F16": "F16", "BF16": "BF16", "F64": "F64"} | {
    f"I{bits}": f"I{bits}" for bits in (8, 16, 32, 64)
}
"""GGUF's types of plain numbers, and their safetensors names."""

FIX = f"convert it to one of {', '.join(TYPES)} with llama.cpp's llama-quantize"


class GgufSource:
    """The tensors of a GGUF file; blocks come as U8 (rows, bytes of a row).

    `values` are the integers and texts of its metadata.

    Raises:
        CheckpointError: the file is damaged, or of types that the `gguf` package does not know.
        MissingPackageError: `gguf` is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.file = SourceFile(path)
        header = read_header(self.file)
        gguf = require("gguf", extra="gguf", why=f"read {path}")  # once there is something to read
        self._tensors, self.values = header.tensors, header.values
        self._types: dict[int, tuple[str, int, int]] = {
            kind.value: (kind.name, *gguf.GGML_QUANT_SIZES[kind])
            for kind in gguf.GGMLQuantizationType
        }
        for name, tensor in self._tensors.items():
            self._check(name, tensor)
        self.names = in_name_order(self._tensors)

    def _check(self, name: str, tensor: GgufTensor) -> None:
        if tensor.type not in self._types:
            raise CheckpointError(
                f"{self.file.path}: {name!r:.200} is of GGUF's type {tensor.type}, which is not"
                " known",
                fix=FIX,
            )
        _, weights, _ = self._types[tensor.type]
        if tensor.shape[-1] % weights:
            raise CheckpointError(
                f"{self.file.path}: {name!r:.200} has rows of {tensor.shape[-1]}, no multiple of"
                f" {weights}",
                fix=FIX,
            )
        end = tensor.begin + self._nbytes(tensor)
        if end > self.file.size:
            raise CheckpointError(
                f"{self.file.path}: {name!r:.200} ends at byte {end} of {self.file.size}",
                fix="fetch it again",
            )

    def _nbytes(self, tensor: GgufTensor) -> int:
        _, weights, nbytes = self._types[tensor.type]
        return math.prod(tensor.shape) // weights * nbytes

    def type_of(self, name: str) -> str:
        """Return GGUF's name of a tensor's type."""
        return self._types[self._tensors[name].type][0]

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape in weights, the longest stride first."""
        return self._tensors[name].shape

    def offset(self, name: str) -> int:
        """Return the byte of the file at which a tensor's data begin."""
        return self._tensors[name].begin

    def info(self, name: str) -> TensorInfo:
        kind, shape = self.type_of(name), self.shape_of(name)
        if kind in _PLAIN:
            return TensorInfo(name=name, dtype=_PLAIN[kind], shape=shape)
        nbytes = self._nbytes(self._tensors[name])
        rows = shape[0] if len(shape) > 1 else 1
        return TensorInfo(name=name, dtype="U8", shape=(rows, nbytes // max(rows, 1)))

    def raw(self, name: str) -> RawTensor:
        info = self.info(name)
        data = self.file.read(self.offset(name), info.nbytes)
        return RawTensor(dtype=info.dtype, shape=info.shape, data=data)


def open_gguf(path: Path) -> QuantisedModel:
    """Open a GGUF file.

    Raises:
        CheckpointError: it is damaged, or holds a type of block that is not read.
        MissingPackageError: `gguf` is not installed.
    """
    source = GgufSource(path)
    _require_whole_model(path, source)
    stored, types = [], {}
    for name in source.names:
        kind = source.type_of(name)
        if kind in _PLAIN:
            continue
        if kind not in TYPES:
            raise CheckpointError(
                f"{path}: {name} is {kind}, and such blocks are not read", fix=FIX
            )
        shape = source.shape_of(name)
        if len(shape) != 2:
            raise CheckpointError(
                f"{path}: {name} has shape {list(shape)}: only matrices are read, not stacked"
                " experts",
                fix="give a model without experts",
            )
        types[name] = kind
        layout = GgufBlocks(shape=(shape[0], shape[1]), type=kind)
        stored.append(Stored(name=name, layout=layout, parts={"blocks": name}))
    config = {"quant_method": "gguf", "types": types}
    return described(path, "gguf", config, stored, source)


def _require_whole_model(path: Path, source: GgufSource) -> None:
    """Refuse a part of a model, and what is none: an adapter, a projector, an importance matrix.

    Raises:
        CheckpointError: the metadata say that it is that.
    """
    count, kind = source.values.get("split.count", 1), source.values.get("general.type", "model")
    if count not in (0, 1):
        raise CheckpointError(
            f"{path} is one of the {count!s:.20} parts of a model",
            fix="join them with llama.cpp's llama-gguf-split --merge, and give the whole",
        )
    if kind != "model":
        raise CheckpointError(
            f"{path} is a GGUF file of the type {kind!r:.40}, and no model",
            fix="give the file of the model",
        )
