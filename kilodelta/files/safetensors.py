"""The safetensors container, read from its raw bytes: what stands where in a file.

Source: https://github.com/huggingface/safetensors#format. The safetensors library hands out
tensors, but not their offsets; streaming needs the offsets.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kilodelta.errors import CheckpointError, KiloDeltaError
from kilodelta.files import canonical, dtypes, staging
from kilodelta.files.tensor import RawTensor, TensorInfo

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
class Layout:
    """A file's header: tensors in the order of their offsets, and where the data start."""

    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]
    header: bytes
    data_start: int


def map_file(path: Path, error: type[KiloDeltaError] = CheckpointError) -> mmap.mmap:
    """Map a regular file read-only, or say why not (a folder, a device, a loop of links)."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError as problem:
        raise error(f"{path} cannot be opened: {_reason(problem)}", fix=_advice(problem)) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{path} is not a regular file", fix="give the path of a file")
        if status.st_size < 8:
            raise error(
                f"{path} holds {status.st_size} bytes, too few for a safetensors header",
                fix="the file is cut or of another kind: fetch it again",
            )
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)


def _reason(problem: OSError) -> str:
    return os.strerror(problem.errno) if problem.errno else str(problem)


def _advice(problem: OSError) -> str:
    if problem.errno == errno.ENOENT:
        return "check the path"
    if problem.errno == errno.ELOOP:
        return "the symbolic links form a loop: give the real file"
    return "check the path and its permissions"


def read_layout(
    data: mmap.mmap | bytes,
    path: Path,
    *,
    limit: int = HEADER_LIMIT,
    error: type[KiloDeltaError] = CheckpointError,
) -> Layout:
    """Parse and check a header: every tensor named once, the data covered without gap or overlap.

    Raises:
        KiloDeltaError: of class `error`, naming the file, the tensor and both values.
    """
    fault = _Fault(path, error)
    length = int.from_bytes(data[:8], "little")
    if length > limit:
        raise fault(f"the header claims {length} bytes; at most {limit} are allowed")
    if 8 + length > len(data):
        raise fault(f"the header claims {length} bytes, but the file has {len(data)} in all")
    header = bytes(data[8 : 8 + length])
    table = _parse(header, fault)
    metadata = _metadata(table.pop("__metadata__", {}), fault)
    start = 8 + length
    entries = sorted(
        (_entry(name, fields, start, fault) for name, fields in table.items()),
        key=lambda entry: (entry.begin, entry.end),
    )
    _check_cover(entries, start, len(data), fault)
    return Layout(entries=tuple(entries), metadata=metadata, header=header, data_start=start)


class _Fault:
    """Makes the errors of one file."""

    def __init__(self, path: Path, error: type[KiloDeltaError]) -> None:
        self.path, self.error = path, error

    def __call__(self, what: str) -> KiloDeltaError:
        return self.error(
            f"{self.path}: {what}", fix="the file is damaged or not safetensors: fetch it again"
        )


def _parse(header: bytes, fault: _Fault) -> dict[str, Any]:
    try:
        table = canonical.loads(header)
    except canonical.NotCanonicalError as problem:
        raise fault(f"the header is not valid JSON: {problem}") from None
    if not isinstance(table, dict):
        raise fault("the header is not a JSON object")
    return table


def _metadata(found: Any, fault: _Fault) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise fault("__metadata__ is not an object of strings")
    return found


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _entry(name: str, fields: Any, start: int, fault: _Fault) -> Entry:
    if "\0" in name:
        raise fault(f"tensor name {name!r} holds a NUL character")
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise fault(f"tensor {name!r} does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes.DTYPES:
        raise fault(f"tensor {name!r} has unknown dtype {dtype!r}")
    if not isinstance(shape, list) or len(shape) > 32 or not all(map(_is_count, shape)):
        raise fault(f"tensor {name!r} has impossible shape {shape!r:.200}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise fault(f"tensor {name!r} has impossible offsets {offsets!r:.200}")
    needed = dtypes.nbytes(dtype, tuple(shape))
    if offsets[1] - offsets[0] != needed:
        raise fault(
            f"tensor {name!r} has offsets {offsets}, but {dtype} {shape} takes {needed} bytes"
        )
    return Entry(
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        begin=start + offsets[0],
    )


def _check_cover(entries: list[Entry], start: int, size: int, fault: _Fault) -> None:
    position = start
    for entry in entries:
        if entry.begin != position:
            kind = "overlaps the one before it" if entry.begin < position else "leaves a gap"
            raise fault(f"tensor {entry.name!r} {kind}: starts at {entry.begin}, not {position}")
        position = entry.end
    if position != size:
        raise fault(f"the tensors end at byte {position}, the file at {size}")


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
