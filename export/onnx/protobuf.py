"""The wire format of Protocol Buffers: where each field of a message lies, nothing decoded.

Source: https://protobuf.dev/programming-guides/encoding/. The `onnx` package hands out tensors, but
not their offsets in the file; patching needs the offsets, and a device has no `onnx`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

from kilodelta.files.source import FileBytes

Data: TypeAlias = FileBytes | bytes

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types; 3 and 4, groups, are extinct."""

_WIDTH = {FIXED64: 8, FIXED32: 4}
_VARINT_LIMIT = 10  # bytes of a 64-bit number, seven bits each


class WireError(ValueError):
    """The bytes are not a message."""


class Field(NamedTuple):
    """One field: `number` and `wire` type; `value` of a varint; its content is [begin, end)."""

    number: int
    wire: int
    value: int
    begin: int
    end: int


def fields(data: Data, begin: int, end: int) -> Iterator[Field]:
    """Yield the fields of the message in [begin, end), in their order.

    Raises:
        WireError: a field is cut, or of an unknown kind.
    """
    position = begin
    while position < end:
        key, position = varint(data, position, end)
        field = _field(data, key >> 3, key & 7, position, end)
        position = field.end
        yield field


def _field(data: Data, number: int, wire: int, position: int, end: int) -> Field:
    if number == 0:
        raise WireError(f"byte {position}: field number 0")
    if wire == VARINT:
        value, stop = varint(data, position, end)
        return Field(number, wire, value, position, stop)
    if wire == BYTES:
        size, position = varint(data, position, end)
    elif wire in _WIDTH:
        size = _WIDTH[wire]
    else:
        raise WireError(f"byte {position}: wire type {wire}")
    if size > end - position:
        raise WireError(f"byte {position}: {size} bytes announced, {end - position} are there")
    return Field(number, wire, 0, position, position + size)


def varint(data: Data, position: int, end: int) -> tuple[int, int]:
    """Read an unsigned number of up to 64 bits; return it, and where the bytes behind it begin."""
    value = 0
    for index in range(min(_VARINT_LIMIT, end - position)):
        byte = data[position + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, position + index + 1
    raise WireError(f"byte {position}: a number without an end")


def varints(data: Data, field: Field) -> Iterator[int]:
    """Read the numbers of a repeated field, packed or not."""
    if field.wire == VARINT:
        yield field.value
        return
    position = field.begin
    while position < field.end:
        value, position = varint(data, position, field.end)
        yield value


def text(data: Data, field: Field) -> str:
    """Read a string.

    Raises:
        WireError: it is not UTF-8.
    """
    try:
        return bytes(data[field.begin : field.end]).decode("utf-8")
    except UnicodeDecodeError:
        raise WireError(f"byte {field.begin}: a name that is not UTF-8") from None
