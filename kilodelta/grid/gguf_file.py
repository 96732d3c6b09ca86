"""Find the quantised weights of a GGUF file, through the `gguf` package's reader.

Names are the file's own (`blk.0.attn_q.weight`); of Llama's queries and keys the rows are in the
order in which llama.cpp wants them, and stay so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kilodelta.errors import CheckpointError, require
from kilodelta.files.checkpoint import in_name_order
from kilodelta.files.source import SourceFile
from kilodelta.files.tensor import RawTensor, TensorInfo
from kilodelta.grid.layouts.gguf_blocks import TYPES, GgufBlocks
from kilodelta.grid.model import QuantisedModel, Stored, described

_PLAIN = {"F32": "F32", "F16": "F16", "BF16": "BF16", "F64": "F64"} | {
    f"I{bits}": f"I{bits}" for bits in (8, 16, 32, 64)
}
"""GGUF's types of plain numbers, and their safetensors names."""

FIX = "convert it to Q4_0, Q4_1, Q8_0, Q4_K or Q6_K with llama.cpp's llama-quantize"


class GgufSource:
    """The tensors of a GGUF file; blocks come as U8 (rows, bytes of a row).

    Raises:
        CheckpointError: the file is damaged, or of types that the reader does not know.
        MissingPackageError: `gguf` is not installed.
    """

    def __init__(self, path: Path) -> None:
        gguf = require("gguf", extra="gguf", why=f"read {path}")
        self.file = SourceFile(path)
        try:
            tensors = gguf.GGUFReader(path).tensors
            self._tensors: dict[str, Any] = {tensor.name: tensor for tensor in tensors}
        except (ValueError, KeyError, IndexError, OSError, OverflowError, TypeError) as problem:
            raise CheckpointError(
                f"{path} is no GGUF file that the gguf package reads: {problem}",
                fix="fetch it again; types that were repacked for one CPU are not portable",
            ) from None
        self.names = in_name_order(self._tensors)

    def type_of(self, name: str) -> str:
        """Return GGUF's name of a tensor's type."""
        return str(self._tensors[name].tensor_type.name)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape in weights, the longest stride first."""
        return tuple(int(n) for n in reversed(self._tensors[name].shape.tolist()))

    def offset(self, name: str) -> int:
        """Return the byte of the file at which a tensor's data begin."""
        return int(self._tensors[name].data_offset)

    def info(self, name: str) -> TensorInfo:
        kind, shape = self.type_of(name), self.shape_of(name)
        if kind in _PLAIN:
            return TensorInfo(name=name, dtype=_PLAIN[kind], shape=shape)
        nbytes = int(self._tensors[name].n_bytes)
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
