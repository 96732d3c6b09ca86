"""The safetensors container, read from its raw bytes: what stands where in a file.

Source: https://github.com/huggingface/safetensors#format. The safetensors library hands out
tensors, but not their offsets; streaming needs the offsets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from kilodelta.errors import KiloDeltaError
from kilodelta.files import canonical, dtypes, staging
from kilodelta.files.source import SourceFile
from kilodelta.files.tensor import RawTensor, TensorInfo
from kilodelta.kinds import kind_of_file

HEADER_LIMIT = 32 << 20
"""Bytes of header accepted in a model's file; real ones stay below 10 MiB."""


@dataclass(frozen=True, kw_only=True)
class Entry(TensorInfo):
    """One tensor of a file; `begin` and `end` are bytes from the start of the file."""

    begin: int

    @property
    def end(self) -> int:
        return self.begin + self.nbytes


@dataclass(frozen=True, kw_only=True)
class HeaderLayout:
    """A file's header: tensors in the order of their offsets, and where the data start."""

    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]
    header: bytes
    data_start: int


def read_layout(file: SourceFile, *, limit: int = HEADER_LIMIT) -> HeaderLayout:
    """Parse and check a file's header.

    Every tensor must be named once, and the tensors must cover the data without gap or overlap.
    As the safetensors library does, unknown fields of a tensor are ignored and a `__metadata__` of
    null counts as none.

    Args:
        file: an open file.
        limit: bytes that the header may have.

    Raises:
        KiloDeltaError: of the file's class, naming the file, the tensor and both values.
    """
    if file.size < 8:
        raise _not_one(file, f"it holds {file.size} bytes, too few for a safetensors header")
    start = 8 + int.from_bytes(file.read(0, 8).tobytes(), "little")
    if start - 8 > limit:
        raise _not_one(file, f"the header claims {start - 8} bytes; at most {limit} are allowed")
    if start > file.size:
        raise _not_one(
            file, f"the header claims {start - 8} bytes, but the file has {file.size} in all"
        )
    header = file.read(8, start - 8).tobytes()
    try:
        return _layout(header, file.size)
    except _HeaderError as problem:
        raise _fault(file, str(problem)) from None


def _not_one(file: SourceFile, what: str) -> KiloDeltaError:
    """Make the error of a file that does not begin as safetensors files do, with what it is."""
    kind = kind_of_file(file.path, file.read(0, min(file.size, 512)).tobytes())
    return _fault(file, what) if kind is None else file.fault(f"it is {kind.what}", fix=kind.fix)


def _fault(file: SourceFile, what: str) -> KiloDeltaError:
    return file.fault(what, fix="the file is damaged or not safetensors: fetch it again")


class _HeaderError(ValueError):
    """What is wrong with a header."""


def _layout(header: bytes, size: int) -> HeaderLayout:
    """Parse the header of a file of `size` bytes."""
    try:
        table = canonical.loads(header)
    except canonical.NotCanonicalError as problem:
        raise _HeaderError(f"the header is not valid JSON: {problem}") from None
    if not isinstance(table, dict):
        raise _HeaderError("the header is not a JSON object")
    metadata = _metadata(table.pop("__metadata__", None))
    start = 8 + len(header)
    entries = sorted(
        (_entry(name, fields, start) for name, fields in table.items()),
        key=lambda entry: (entry.begin, entry.end),
    )
    _check_cover(entries, start, size)
    return HeaderLayout(entries=tuple(entries), metadata=metadata, header=header, data_start=start)


def _metadata(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _HeaderError("__metadata__ is not an object of strings")
    return value


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _entry(name: str, fields: Any, start: int) -> Entry:
    """Check one tensor's fields; its offsets count from `start`."""
    if "\0" in name:
        raise _HeaderError(f"tensor name {name!r:.200} holds a NUL character")
    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= set(fields):
        raise _HeaderError(f"tensor {name!r:.200} does not have dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes.DTYPES:
        raise _HeaderError(f"tensor {name!r:.200} has unknown dtype {dtype!r:.40}")
    if not isinstance(shape, list) or len(shape) > 32 or not all(map(_is_count, shape)):
        raise _HeaderError(f"tensor {name!r:.200} has impossible shape {shape!r:.200}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise _HeaderError(f"tensor {name!r:.200} has impossible offsets {offsets!r:.200}")
    if dtypes.DTYPES[dtype].bits * prod(shape) % 8:
        raise _HeaderError(f"tensor {name!r:.200} of {dtype} {shape} ends within a byte")
    entry = Entry(name=name, dtype=dtype, shape=tuple(shape), begin=start + offsets[0])
    if offsets[1] - offsets[0] != entry.nbytes:
        raise _HeaderError(
            f"tensor {name!r:.200} has offsets {offsets}, "
            f"but {dtype} {shape} takes {entry.nbytes} bytes"
        )
    return entry


def _check_cover(entries: list[Entry], start: int, size: int) -> None:
    position = start
    for entry in entries:
        if entry.begin != position:
            kind = "overlaps the one before it" if entry.begin < position else "leaves a gap"
            raise _HeaderError(
                f"tensor {entry.name!r:.200} {kind}: starts at {entry.begin}, not {position}"
            )
        position = entry.end
    if position != size:
        raise _HeaderError(f"the tensors end at byte {position}, the file at {size}")


def header_bytes(tensors: Iterable[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Encode the length and header of a file whose tensors' data follow in the given order.

    The header is canonical JSON, padded with spaces to a multiple of eight bytes.

    Example:
        >>> header_bytes([TensorInfo(name="w", dtype="U8", shape=(3,))], {})[8:]
        b'{"w":{"data_offsets":[0,3],"dtype":"U8","shape":[3]}}   '
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for tensor in tensors:
        end = position + tensor.nbytes
        table[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = canonical.dumps(table).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def wide_first(tensors: Iterable[TensorInfo]) -> list[TensorInfo]:
    """Sort by descending element width, so that every tensor is aligned, then by UTF-8 name."""
    return sorted(tensors, key=lambda t: (-dtypes.DTYPES[t.dtype].bits, t.name.encode("utf-8")))


def encode(
    tensors: Mapping[str, RawTensor], metadata: Mapping[str, str]
) -> tuple[bytes, list[memoryview]]:
    """Return a file's header and its tensors' data, in the order of `wide_first`."""
    order = wide_first(tensor.info(name) for name, tensor in tensors.items())
    return header_bytes(order, metadata), [tensors[info.name].data.data for info in order]


def write(
    path: Path, tensors: Mapping[str, RawTensor], metadata: Mapping[str, str] | None = None
) -> int:
    """Write a safetensors file in full or not at all; return its size in bytes.

    Args:
        path: the new file; an earlier one is replaced.
        tensors: by name, written in the order of `wide_first`.
        metadata: the texts of `__metadata__`.

    Raises:
        OutputError: it cannot be written there.
    """
    header, data = encode(tensors, metadata or {})
    staging.write(path, header, *data)
    return len(header) + sum(part.nbytes for part in data)


def write_stream(
    path: Path,
    order: Sequence[TensorInfo],
    data: Iterable[bytes | memoryview],
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write a safetensors file whose tensors are made one by one; return its size in bytes.

    Args:
        path: the new file; an earlier one is replaced.
        order: the tensors in the order of their data.
        data: their raw little-endian bytes, in that order.
        metadata: the texts of `__metadata__`.

    Raises:
        OutputError: it cannot be written there.
        ValueError: a part has another size than its tensor.
    """
    header = header_bytes(order, metadata or {})
    with staging.new_file(path) as stage, stage.open("wb") as file:
        file.write(header)
        for tensor, part in zip(order, data, strict=True):
            if memoryview(part).nbytes != tensor.nbytes:
                raise ValueError(f"{tensor} came with {memoryview(part).nbytes} bytes")
            file.write(part)
    return len(header) + sum(tensor.nbytes for tensor in order)
