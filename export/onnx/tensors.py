"""One tensor of an ONNX file: its name, dtype and shape, and where its bytes lie.

Source of the field numbers: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto (TensorProto).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from pathlib import PurePosixPath

from kilodelta.export.onnx.protobuf import (
    BYTES,
    VARINT,
    Data,
    Field,
    WireError,
    fields,
    text,
    varints,
)
from kilodelta.files import dtypes
from kilodelta.files.tensor import TensorInfo

_DIMS, _DATA_TYPE, _SEGMENT, _FLOAT_DATA, _NAME, _RAW_DATA = 1, 2, 3, 4, 8, 9
_DOUBLE_DATA, _EXTERNAL_DATA, _DATA_LOCATION = 10, 13, 14
_KEY, _VALUE = 1, 2  # StringStringEntryProto
_PACKED = {21: False, 22: True}  # TensorProto.DataType UINT4 and INT4: whether they are signed
_TYPED = {"F32": _FLOAT_DATA, "F64": _DOUBLE_DATA}
"""Typed fields whose packed content equals the raw bytes."""


@dataclass(frozen=True, kw_only=True)
class Stored(TensorInfo):
    """One tensor: `file` relative to the model's folder, its bytes there from `begin` on.

    `top` says that it is an initializer of the main graph, which runtimes know by its name.
    """

    file: str
    begin: int
    top: bool


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """A tensor of 4-bit integers, two per byte, the first in the low bits; as `Stored` otherwise.

    safetensors has no such type, so it holds no base tensor as it is.
    """

    name: str
    signed: bool
    shape: tuple[int, ...]
    file: str
    begin: int

    @property
    def nbytes(self) -> int:
        """Bytes of its data in a file."""
        return (prod(self.shape) + 1) // 2


@dataclass
class _Message:
    """A TensorProto's fields, taken apart."""

    name: str = ""
    kind: int = 0
    external: bool = False
    shape: list[int] = field(default_factory=list)
    pieces: dict[int, list[Field]] = field(default_factory=dict)

    def add(self, data: Data, part: Field) -> None:
        if part.number == _DIMS and part.wire in (VARINT, BYTES):
            self.shape += varints(data, part)
        elif part.wire == VARINT and part.number == _DATA_TYPE:
            self.kind = part.value
        elif part.wire == VARINT and part.number == _DATA_LOCATION:
            self.external = part.value == 1
        elif part.wire == BYTES and part.number == _NAME:
            self.name = text(data, part)
        elif part.wire == BYTES:
            self.pieces.setdefault(part.number, []).append(part)


def read_tensor(
    data: Data, message: Field, main: str, *, top: bool = False, name: str = ""
) -> tuple[str, Stored | PackedWeight | None]:
    """Read a tensor's name and its place; None where its bytes do not lie in one piece.

    Args:
        main: the name of the file that `data` are from.
        name: of a constant, which bears its node's output's name instead of its own.

    Raises:
        WireError: the message is damaged, or its external data lie outside the model's folder.
    """
    proto = _Message()
    for part in fields(data, message.begin, message.end):
        proto.add(data, part)
    name = name or proto.name
    if proto.kind in _PACKED and _SEGMENT not in proto.pieces:
        return name, _packed(data, proto, name, main)
    if proto.kind not in dtypes.BY_ONNX_NUMBER or _SEGMENT in proto.pieces:
        return name, None
    dtype, shape = dtypes.BY_ONNX_NUMBER[proto.kind].name, _shape(proto.shape, name)
    size = dtypes.nbytes(dtype, shape)
    place = _external(data, proto, size) if proto.external else _inside(proto, dtype, size, main)
    if place is None:
        return name, None
    file, begin = place
    return name, Stored(name=name, dtype=dtype, shape=shape, file=file, begin=begin, top=top)


def _packed(data: Data, proto: _Message, name: str, main: str) -> PackedWeight | None:
    weight = PackedWeight(
        name=name, signed=_PACKED[proto.kind], shape=_shape(proto.shape, name), file=main, begin=0
    )
    if proto.external:
        place: tuple[str, int] | None = _external(data, proto, weight.nbytes)
    else:
        place = _inside(proto, "", weight.nbytes, main)
    return None if place is None else replace(weight, file=place[0], begin=place[1])


def _shape(dims: list[int], name: str) -> tuple[int, ...]:
    if len(dims) > 32 or any(extent >= 1 << 63 for extent in dims):
        raise WireError(f"tensor {name!r:.80} has an impossible shape")
    return tuple(dims)


def _inside(proto: _Message, dtype: str, size: int, main: str) -> tuple[str, int] | None:
    raw = proto.pieces.get(_RAW_DATA, []) or proto.pieces.get(_TYPED.get(dtype, 0), [])
    if len(raw) != 1 or raw[0].end - raw[0].begin != size:
        return None
    return main, raw[0].begin


def _external(data: Data, message: _Message, size: int) -> tuple[str, int]:
    entries = dict(_entry(data, entry) for entry in message.pieces.get(_EXTERNAL_DATA, []))
    location, offset = entries.get("location", ""), entries.get("offset", "0")
    length = entries.get("length", str(size))
    if not (_is_count(offset) and _is_count(length)):
        raise WireError(f"external data at {location!r:.80} have no offset or length")
    if int(length) != size:
        raise WireError(f"external data at {location!r:.80} have {length} bytes, not {size}")
    if not is_inside(location):
        raise WireError(f"external data at {location!r:.80} lie outside the model's folder")
    return location, int(offset)


def _entry(data: Data, entry: Field) -> tuple[str, str]:
    parts = {f.number: f for f in fields(data, entry.begin, entry.end) if f.wire == BYTES}
    if not {_KEY, _VALUE} <= parts.keys():
        raise WireError(f"byte {entry.begin}: an entry without key or value")
    return text(data, parts[_KEY]), text(data, parts[_VALUE])


def _is_count(value: str) -> bool:
    return value.isascii() and value.isdigit() and len(value) < 19


def is_inside(location: str) -> bool:
    """Return whether a path stays in the folder that it starts from, on every system."""
    place = PurePosixPath(location)
    strange = set(location) & set("\\:") or not location.isprintable()
    return bool(place.parts) and not (place.is_absolute() or ".." in place.parts or strange)
