"""Damage bytes and JSON, each time in one way that is drawn at random."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from random import Random
from typing import Any, TypeAlias

Mutate: TypeAlias = Callable[[bytes, Random], bytes]
"""Takes valid bytes and a source of randomness; returns other bytes."""

NUMBERS: Sequence[Any] = (
    0, -0.0, 1, -1, 2, 7, 255, 65_535, 2**31, 2**32, -(2**31), 2**63 - 1, 2**63, 2**64 + 1,
    -(2**63), 10**30, 10**299, 0.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"),
)  # fmt: skip
TEXTS: Sequence[str] = (
    "", " ", ".", "..", "/", "../../outside", "/etc/hostname", "a\0b", "a/b", "a\\b", "C:x", "\n",
    "\x1b[2J", "\u202e", "\ud800", "\U0001f600", "é", "e\u0301", "%s%n", "{0}", "x" * 2000,
    "[bold]", "(a|b)+", "*" * 40, "[", "sha256:" + "0" * 64, "sha256:" + "g" * 64, "float32", "F32",
    "__class__", "weight", "model.safetensors", "0" * 400, "١٢", "1e5", "NaN", "null",
)  # fmt: skip
ODD: Sequence[Any] = (None, True, False, [], {}, [[]], [{}], {"": {}}, [None], [0, "x", {}])
DEEP = 5000
"""Levels of nesting, more than Python's stack takes."""


def bytes_changed(data: bytes, random: Random) -> bytes:
    """Flip a bit, cut, repeat, insert, swap or overwrite; once or several times."""
    for _ in range(random.choice((1, 1, 1, 2, 5, 20))):
        data = random.choice(_BYTES)(data, random)
    return data


def _place(data: bytes, random: Random) -> int:
    """A place anywhere, or near the beginning or end, where lengths and magic numbers stand."""
    near = min(64, len(data))
    ends = (random.randrange(near + 1), len(data) - random.randrange(near + 1))
    return random.choice((random.randrange(len(data) + 1), *ends))


def _flip(data: bytes, random: Random) -> bytes:
    if not data:
        return b"\0"
    place = min(_place(data, random), len(data) - 1)
    return data[:place] + bytes([data[place] ^ 1 << random.randrange(8)]) + data[place + 1 :]


def _cut(data: bytes, random: Random) -> bytes:
    return data[: _place(data, random)]


def _without(data: bytes, random: Random) -> bytes:
    begin = _place(data, random)
    return data[:begin] + data[begin + random.choice((1, 2, 8, 64, 4096)) :]


def _insert(data: bytes, random: Random) -> bytes:
    place = _place(data, random)
    return data[:place] + random.randbytes(random.choice((1, 2, 8, 64))) + data[place:]


def _repeat(data: bytes, random: Random) -> bytes:
    begin = _place(data, random)
    part = data[begin : begin + random.choice((1, 8, 64, 512))]
    return data[:begin] + part * random.choice((2, 3, 100)) + data[begin:]


def _overwrite(data: bytes, random: Random) -> bytes:
    place = _place(data, random)
    number = random.choice((0, 1, 127, 128, 255, 2**16 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
    part = number.to_bytes(8, "little")[: random.choice((1, 2, 4, 8))]
    return data[:place] + part + data[place + len(part) :]


def _digits(data: bytes, random: Random) -> bytes:
    """Overwrite one byte by a character that means something to parsers of text."""
    if not data:
        return b"{"
    place = min(_place(data, random), len(data) - 1)
    return data[:place] + bytes([random.choice(b'0179-+.eE"{}[],:\\/ \n\t\0')]) + data[place + 1 :]


_BYTES: Sequence[Mutate] = (_flip, _flip, _cut, _without, _insert, _repeat, _overwrite, _digits)


def json_changed(data: bytes, random: Random) -> bytes:
    """Change the values of a JSON text, or now and then its spelling."""
    if random.random() < 0.1:
        return random.choice(_SPELLINGS)(data, random)
    value = json.loads(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        value = changed(value, random)
    return spelled(value)


def spelled(value: Any) -> bytes:
    """Write JSON with whatever it holds, lone surrogates included."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def changed(value: Any, random: Random) -> Any:
    """Return a value with one node somewhere in it replaced, removed, added or renamed."""
    nodes = _nodes(value)
    parent, key = random.choice(nodes)
    if parent is None:
        return other(value, random)
    step = random.random()
    if step < 0.15:
        del parent[key]
    elif step < 0.25 and isinstance(parent, dict):
        parent[random.choice((*TEXTS, *(k for p, k in nodes if isinstance(p, dict))))] = parent.pop(
            key
        )
    elif step < 0.35:
        extra = other(parent[key], random)
        if isinstance(parent, dict):
            parent[random.choice(TEXTS)] = extra
        else:
            parent[key:key] = [extra] * random.choice((1, 1, 3, 1000))
    elif step < 0.5:
        source, place = random.choice(nodes[1:])
        # A copy, because a value inside itself is no JSON.
        parent[key] = json.loads(spelled(source[place]).decode("utf-8", "replace"))
    else:
        parent[key] = other(parent[key], random)
    return value


def _nodes(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a JSON value: the container and the key, (None, None) for the whole."""
    places: list[tuple[Any, Any]] = [(None, None)]
    rest = [value] if isinstance(value, (dict, list)) else []
    while rest and len(places) < 5000:
        parent = rest.pop()
        keys = list(parent) if isinstance(parent, dict) else range(len(parent))
        places += [(parent, key) for key in keys]
        rest += [parent[key] for key in keys if isinstance(parent[key], (dict, list))]
    return places


def other(value: Any, random: Random) -> Any:
    """Return another value: a neighbour of the same type, or one of another type."""
    if random.random() < 0.5:
        if isinstance(value, bool):
            return not value
        if isinstance(value, (int, float)):
            return random.choice((value + 1, value - 1, -value, value * 2, value * 10**6))
        if isinstance(value, str):
            return _text(value, random)
        if isinstance(value, list):
            return random.choice((value[::-1], value * 2, value[:-1], [value], value[:1] * 300))
    # A copy: what is drawn goes into a value that further changes are made to.
    return deepcopy(random.choice((*NUMBERS, *TEXTS, *ODD, {"a": value}, [value])))


def _text(value: str, random: Random) -> str:
    if not value:
        return random.choice(TEXTS)
    place = random.randrange(len(value))
    character = random.choice("a0/.\0\n*[]()é\u202e\ud800")
    return random.choice(
        (
            value[:place] + character + value[place + 1 :],
            value[:place],
            value * 3,
            value + random.choice(TEXTS),
            value.upper(),
        )
    )


def _key_twice(data: bytes, random: Random) -> bytes:
    return data.replace(b"{", b'{"version":1,"version":2,', 1)


def _deep(data: bytes, random: Random) -> bytes:
    opening, closing = random.choice(((b"[", b"]"), (b'{"a":', b"}")))
    depth = random.choice((70, 500, DEEP, 20 * DEEP))
    nest = opening * depth + b"1" + closing * depth * random.randrange(2)
    place = data.find(b":") + 1
    return random.choice((nest, data[:place] + nest + data[place:]))


def _huge(data: bytes, random: Random) -> bytes:
    number = b"9" * random.choice((301, 5000, 200_000)) + random.choice((b"", b".5", b"e9"))
    places = [i for i in range(1, len(data)) if data[i - 1 : i] in (b":", b"[", b" ")]
    place = random.choice(places or [0])
    return data[:place] + number + data[place + 1 :]


def _encoded(data: bytes, random: Random) -> bytes:
    text = data.decode("utf-8", "replace")
    return random.choice(
        (b"\xef\xbb\xbf" + data, text.encode("utf-16"), text.encode("utf-32"), data + b"\xff")
    )


def _surrounded(data: bytes, random: Random) -> bytes:
    return random.choice((data + data, b"[" + data + b"]", b" " * 1000 + data, b"\0" + data, b""))


_SPELLINGS: Sequence[Mutate] = (_key_twice, _deep, _huge, _encoded, _surrounded, bytes_changed)


def lines_changed(data: bytes, random: Random) -> bytes:
    """Change a text of lines: one line by bytes or by what parsers trip over, or their order."""
    lines = data.split(b"\n")
    place = random.randrange(len(lines))
    step = random.randrange(6)
    if step == 0:
        lines[place] = bytes_changed(lines[place], random)
    elif step == 1:
        lines[place] = random.choice(TEXTS).encode("utf-8", "surrogatepass")
    elif step == 2:
        lines[place] = lines[place] * random.choice((2, 1000))
    elif step == 3:
        lines[place:place] = [lines[place]] * random.choice((1, 300))
    elif step == 4:
        del lines[place]
    else:
        lines[place] = random.choice((b"\r", b"\x0b\x0c", "\u2028\u0085".encode(), b"\0" * 100))
    return b"\n".join(lines)


def json_lines_changed(data: bytes, random: Random) -> bytes:
    """Change one line of JSON as JSON, or the text as lines."""
    if random.random() < 0.3:
        return lines_changed(data, random)
    lines = data.rstrip(b"\n").split(b"\n")
    place = random.randrange(len(lines))
    lines[place] = json_changed(lines[place], random)
    return b"\n".join(lines) + b"\n"
