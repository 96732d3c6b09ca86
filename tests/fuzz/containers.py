"""Damage what lies inside a container, and close the container again around it.

A flipped bit in a file with a digest is noticed by the digest and never reaches the parsers behind
it; so most inputs are given right lengths, offsets, digests and checksums.
"""

from __future__ import annotations

import io
import json
import struct
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.mutations import TEXTS, bytes_changed, changed, json_changed, spelled
from tests.support import making

WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2,
          "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1}  # fmt: skip


def split(data: bytes) -> tuple[bytes, bytes]:
    """Return header and data of a safetensors file."""
    end = 8 + int.from_bytes(data[:8], "little")
    return data[8:end], data[end:]


def joined(header: bytes, data: bytes) -> bytes:
    """Return a safetensors file with the right length of its header."""
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data


def safetensors_changed(data: bytes, random: Random) -> bytes:
    """Change a header as JSON, a tensor's dtype and shape consistently, values, or bytes."""
    header, body = split(data)
    step = random.random()
    if step < 0.2:
        return bytes_changed(data, random)
    if step < 0.6:
        return joined(json_changed(header, random), body)
    if step < 0.75:
        return joined(header, _values(body, random))
    table = json.loads(header)
    names = [name for name in table if name != "__metadata__"]
    entry = table[random.choice(names)]
    begin, end = entry["data_offsets"]
    dtype = random.choice(list(WIDTHS))
    count = (end - begin) // WIDTHS[dtype]
    shapes: tuple[list[int], ...] = (
        [count],
        [1, count],
        [count, 1],
        [0, count],
        [1] * 40 + [count],
        [-1, -count],
        [],
    )
    entry |= {"dtype": dtype, "shape": random.choice(shapes)}
    return joined(spelled(table), body)


def _values(body: bytes, random: Random) -> bytes:
    """Set some values to NaN, infinity, zero or other extremes, in any width."""
    out = bytearray(body)
    for _ in range(random.choice((1, 5, 200))):
        part = random.choice(
            (b"\xff" * 4, b"\0\0\x80\x7f", b"\0\x7c", b"\0" * 8, b"\xff\xff\x7f\x7f", b"\0\x80")
        )
        place = random.randrange(len(out) // 4 + 1) * 4
        out[place : place + len(part)] = part
    return bytes(out[: len(body)])


def kd_changed(data: bytes, random: Random) -> bytes:
    """Change a `.kd` file's manifest or coefficients under a right digest, or any of its bytes."""
    if random.random() < 0.2:
        return safetensors_changed(data, random)
    header, body = split(data)
    table = json.loads(header)
    metadata = table.pop("__metadata__")
    text: Any = metadata["kilodelta"]
    if random.random() < 0.8:
        value = json.loads(text)
        for _ in range(random.choice((1, 1, 2, 3))):
            value = changed(value, random)
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        text = text.encode("utf-8", "replace").decode()
    tensors = {
        name: (
            entry["dtype"],
            tuple(entry["shape"]),
            _part(body[slice(*entry["data_offsets"])], random),
        )
        for name, entry in table.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        return making.forge(Path(folder) / "x.kd", tensors, text).read_bytes()


def _part(data: bytes, random: Random) -> bytes:
    return _values(data, random) if data and random.random() < 0.2 else data


def npz_changed(data: bytes, random: Random) -> bytes:
    """Change a member's header, data or name, add members, or change the archive's bytes."""
    if random.random() < 0.3:
        return bytes_changed(data, random)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    place = random.randrange(len(members))
    name, content = members[place]
    step = random.choice((0, 0, 0, 0, 1, 2, 1, 2, 1, 2, 3, 3, 3, 4, 4, 5))
    if step == 0:
        members[place] = (name, bytes_changed(content, random))
    elif step in (1, 2):
        members[place] = (name, _npy_changed(content, random))
    elif step == 3:
        members[place] = (random.choice(TEXTS).replace("\ud800", "") + ".npy", content)
    elif step == 4:
        members.append(random.choice(members))
    out = io.BytesIO()
    if step == 5:
        out.write(_zeros())
    with zipfile.ZipFile(out, "a", random.choice((0, zipfile.ZIP_DEFLATED))) as archive:
        for name, content in members:
            try:
                archive.writestr(name, content)
            except (UserWarning, ValueError):  # a name twice is what is wanted; NUL cannot be
                continue
    return out.getvalue()


@cache
def _zeros() -> bytes:
    """An archive of 100 kilobytes that holds an array of 96 MB."""
    header = "{'descr': '|u1', 'fortran_order': False, 'shape': (3, 33554432), }"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros.npy", _npy(header) + bytes(96 << 20))
    return out.getvalue()


def _npy(header: str) -> bytes:
    text = header.encode("latin1", "replace")
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) & 0xFFFF) + text


def _npy_changed(content: bytes, random: Random) -> bytes:
    """Give an array another header."""
    size = struct.unpack("<H", content[8:10])[0]
    header, body = content[10 : 10 + size].decode("latin1"), content[10 + size :]
    kinds = ("<f4", "<f8", "<i8", "|b1", "|O", "<U3", "<c16", "<M8[s]", "V8", "<f2", ">f4", "f999")
    shapes = ("()", "(0,)", "(-1,)", "(2**40,)", "(4294967296, 4294967296)", "(1e9,)", "None",
              "(1,)*40", "((1,),)", "(True,)", f"({len(body)},)", "(" * 300)  # fmt: skip
    step = random.randrange(3)
    if step == 0:
        return content[:10] + bytes_changed(content[10 : 10 + size], random) + body
    if step == 1:
        return _npy(header.strip().replace(header.split("'")[3], random.choice(kinds))) + body
    shape = random.choice(shapes)
    return (
        _npy(f"{{'descr': '{random.choice(kinds)}', 'fortran_order': False, 'shape': {shape}}}")
        + body
    )


def zip_changed(data: bytes, random: Random) -> bytes:
    """Change a member of a zip archive under a right checksum, or the archive's bytes."""
    if random.random() < 0.3:
        return bytes_changed(data, random)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as made:
        infos = source.infolist()
        chosen = random.choice(infos + [i for i in infos if i.filename.endswith(".pkl")] * 5)
        for info in infos:
            content = source.read(info)
            made.writestr(info, bytes_changed(content, random) if info is chosen else content)
    return out.getvalue()


def protobuf_changed(data: bytes, random: Random) -> bytes:
    """Change one field of a message, or of one inside it, under right lengths; or any bytes."""
    if random.random() < 0.3:
        return bytes_changed(data, random)
    fields = _fields(data)
    if not fields:
        return bytes_changed(data, random)
    place = random.randrange(len(fields))
    number, wire, value = fields[place]
    step = random.random()
    if isinstance(value, bytes) and step < 0.7 and len(value) > 2 and _fields(value):
        fields[place] = (number, wire, protobuf_changed(value, random))
    elif step < 0.75:
        fields[place:place] = [fields[place]] * random.choice((1, 50))
    elif step < 0.8:
        del fields[place]
    elif step < 0.85:
        fields[place] = (random.choice((1, 2, 5, 7, 8, 9, 13, 14, 2**29 - 1)), wire, value)
    elif isinstance(value, bytes):
        text = random.choice(TEXTS).encode("utf-8", "replace")
        options = (b"", text, bytes_changed(value, random), _nested(value, random))
        fields[place] = (number, wire, random.choice(options))
    else:
        options_ = (0, 1, value + 1, 2**31, 2**63, 2**64 - 1, random.randrange(30))
        fields[place] = (number, wire, random.choice(options_))
    return b"".join(_field(*field) for field in fields)


def _nested(value: bytes, random: Random) -> bytes:
    """A graph in an attribute of a node of a graph, and so on: 1 and 5 and 6 are their numbers."""
    for _ in range(random.choice((3, 200, 3000))):
        value = _field(1, 2, _field(5, 2, _field(6, 2, value)))
    return value


def _fields(data: bytes) -> list[tuple[int, int, Any]]:
    """The fields of a message; empty where the bytes are none."""
    fields: list[tuple[int, int, Any]] = []
    place = 0
    try:
        while place < len(data):
            key, place = _varint(data, place)
            number, wire = key >> 3, key & 7
            value: Any
            if wire == 0:
                value, place = _varint(data, place)
            elif wire == 2:
                size, place = _varint(data, place)
                value, place = data[place : place + size], place + size
            elif wire in (1, 5):
                size = 8 if wire == 1 else 4
                value, place = data[place : place + size], place + size
            else:
                return []
            if place > len(data) or number == 0:
                return []
            fields.append((number, wire, value))
    except IndexError:
        return []
    return fields


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value, place, shift = value | (byte & 127) << shift, place + 1, shift + 7
        if byte < 128:
            return value, place


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, wire: int, value: Any) -> bytes:
    key = _encoded(number << 3 | wire)
    if wire == 0:
        return key + _encoded(value)
    data: bytes = value
    return key + (_encoded(len(data)) if wire == 2 else b"") + data
