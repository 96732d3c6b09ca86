"""Read the initializers of an ONNX graph as tensors; types that safetensors lacks come as U8."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from kilodelta.errors import CheckpointError, KiloDeltaError, one_line, require
from kilodelta.files import plain
from kilodelta.files.checkpoint import in_name_order
from kilodelta.files.dtypes import BY_ONNX_NUMBER
from kilodelta.files.tensor import RawTensor, TensorInfo


class OnnxSource:
    """The initializers of a graph, without the types that safetensors lacks: those come as U8.

    Raises:
        CheckpointError: the file is no ONNX model, or its external data are missing.
        MissingPackageError: `onnx` is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with plain.explained(path, CheckpointError):
            os.close(plain.open_file(path, follow=True))
        # Once there is something to read.
        self._onnx: Any = require("onnx", extra="onnx", why=f"read {path}")
        with explained(path):
            self.model = self._onnx.load(path, load_external_data=False)
            tensors = self.model.graph.initializer
            self.external = any(tensor.external_data for tensor in tensors)
            if self.external:
                self._onnx.load_external_data_for_model(self.model, str(path.parent))
            # A name that is not UTF-8 comes as bytes.
            self.tensors = {tensor.name: tensor for tensor in self.model.graph.initializer}
            self.names = in_name_order(self.tensors)

    @property
    def external_bytes(self) -> int:
        """Bytes of the weights that lie beside the graph's own file."""
        return sum(len(t.raw_data) for t in self.tensors.values()) if self.external else 0

    def type_of(self, name: str) -> str:
        """Return ONNX's name of an initializer's type."""
        return str(self._onnx.TensorProto.DataType.Name(self.tensors[name].data_type))

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return an initializer's shape in elements."""
        return tuple(self.tensors[name].dims)

    def info(self, name: str) -> TensorInfo:
        raw = self.raw(name)
        return raw.info(name)

    def raw(self, name: str) -> RawTensor:
        with explained(self.path):
            return self._raw(name)

    def _raw(self, name: str) -> RawTensor:
        tensor = self.tensors[name]
        kind = self.type_of(name)
        if kind in ("FLOAT8E4M3FN", "FLOAT4E2M1", "INT4", "UINT4", "INT2", "UINT2"):
            flat = np.frombuffer(self._packed(tensor), np.uint8)
            dtype = "F8_E4M3" if kind == "FLOAT8E4M3FN" else "U8"
            return RawTensor(dtype=dtype, shape=(flat.size,), data=flat)
        row = BY_ONNX_NUMBER.get(tensor.data_type)
        if row is None:
            raise CheckpointError(
                f"initializer {name:.200} has type {kind}, which is not read", fix="export it anew"
            )
        array = self._onnx.numpy_helper.to_array(tensor)
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return RawTensor(dtype=row.name, shape=tuple(tensor.dims), data=flat)

    def replace(self, name: str, data: bytes) -> None:
        """Give an initializer of the graph in memory other raw bytes."""
        tensor = self.tensors[name]
        for field in ("int32_data", "float_data", "int64_data"):
            tensor.ClearField(field)
        tensor.raw_data = data

    def _packed(self, tensor: Any) -> bytes:
        """Return the packed bytes, of which int32_data holds one per number."""
        if tensor.HasField("raw_data"):
            return bytes(tensor.raw_data)
        return bytes(word & 0xFF for word in tensor.int32_data)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn any error about a graph that breaks ONNX's rules into a sentence."""
    try:
        yield
    except (KiloDeltaError, MemoryError):
        raise
    except Exception as problem:  # protobuf and onnx raise classes of their own
        raise CheckpointError(
            f"{path} is no ONNX model that can be read: {one_line(problem)}",
            fix="fetch it again, with its external data beside it",
        ) from None
