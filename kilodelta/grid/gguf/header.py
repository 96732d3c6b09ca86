"""Read a GGUF file's header: what its tensors are, where they lie, and what describes the model.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
The `gguf` package's own reader is for files that one trusts: it maps the file, and takes a file's
counts at their word. Here lists are skipped by arithmetic, and every count must fit into the bytes
that follow it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from kilodelta.errors import CheckpointError
from kilodelta.files.plain import INDEX_LIMIT
from kilodelta.files.source import SourceFile

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_SCALARS: Mapping[int, int] = {
    0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8
}  # fmt: skip
"""Bytes of the types of single values by GGUF's numbers."""
_INTEGERS: Mapping[int, str] = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 10: "<Q", 11: "<q"
}  # fmt: skip
"""Those that are integers, and `struct`'s codes of them."""
_UINT32, _STRING, _ARRAY = 4, 8, 9
_MAX_DIMENSIONS = 4
_FIX = "fetch it again; types that were repacked for one CPU are not portable"


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One tensor: GGUF's number of its type, its shape with the longest stride first, its place.

    `begin` is in bytes from the start of the file.
    """

    type: int
    shape: tuple[int, ...]
    begin: int


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """What a file's header says.

    Attributes:
        tensors: by name, in file order.
        values: the metadata that are one integer or one text; floats and arrays are passed over.
    """

    tensors: Mapping[str, GgufTensor]
    values: Mapping[str, int | str]


def read_header(file: SourceFile) -> GgufHeader:
    """Read a file's header.

    Args:
        file: an open file; at most `INDEX_LIMIT` bytes of it are read.

    Raises:
        CheckpointError: it is no GGUF file of these versions, or a count does not fit into it.
    """
    reader = _Reader(file)
    if reader.take(4) != MAGIC:
        raise reader.fault("begins otherwise than a GGUF file")
    version = reader.number("<I")
    if version not in VERSIONS:
        raise reader.fault(f"is of version {version}; little-endian 2 and 3 are read")
    count, pairs = reader.number("<Q"), reader.number("<Q")
    alignment = 32
    values: dict[str, int | str] = {}
    for _ in range(pairs):
        name, kind = reader.text(), reader.number("<I")
        value = reader.value(kind)
        if value is not None:
            values[name] = value
        if name == "general.alignment" and kind == _UINT32:
            assert isinstance(value, int)  # so its type says
            alignment = value
    infos: dict[str, GgufTensor] = {}
    for _ in range(count):
        name = reader.text()
        if name in infos:
            raise reader.fault(f"names the tensor {name!r:.200} twice")
        infos[name] = reader.tensor()
    if alignment == 0 or alignment & (alignment - 1):
        raise reader.fault(f"has an alignment of {alignment}, which is no power of two")
    start = math.ceil(reader.place / alignment) * alignment
    tensors = {
        name: GgufTensor(type=t.type, shape=t.shape, begin=start + t.begin)
        for name, t in infos.items()
    }
    return GgufHeader(tensors=tensors, values=values)


class _Reader:
    """A place in the bytes of a header."""

    def __init__(self, file: SourceFile) -> None:
        self._path = file.path
        self._data = file.read(0, min(file.size, INDEX_LIMIT)).tobytes()
        self.place = 0

    def fault(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path} {what}", fix=_FIX)

    def take(self, nbytes: int) -> bytes:
        end = self.place + nbytes
        if end > len(self._data):
            raise self.fault(f"states {nbytes} bytes at byte {self.place}, and its header ends")
        part = self._data[self.place : end]
        self.place = end
        return part

    def number(self, form: str) -> int:
        (value,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return int(value)

    def text(self) -> str:
        data = self.take(self.number("<Q"))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fault(f"has a name at byte {self.place} that is not UTF-8") from None

    def value(self, kind: int) -> int | str | None:
        """Read an integer or a text; pass over a value of any other type, and return None."""
        if kind in _INTEGERS:
            return self.number(_INTEGERS[kind])
        if kind == _STRING:
            return self.take(self.number("<Q")).decode("utf-8", errors="replace")
        if kind in _SCALARS:
            self.take(_SCALARS[kind])
        elif kind == _ARRAY:
            inner, count = self.number("<I"), self.number("<Q")
            if inner in _SCALARS:
                self.take(count * _SCALARS[inner])
            elif inner == _STRING:
                for _ in range(count):
                    self.take(self.number("<Q"))
            else:
                raise self.fault(f"has an array of type {inner}, which is not read")
        else:
            raise self.fault(f"has a value of type {kind}, which is not read")
        return None

    def tensor(self) -> GgufTensor:
        dimensions = self.number("<I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self.fault(f"has a tensor of {dimensions} dimensions")
        sizes = [self.number("<Q") for _ in range(dimensions)]
        kind, begin = self.number("<I"), self.number("<Q")
        return GgufTensor(type=kind, shape=tuple(reversed(sizes)), begin=begin)
