"""Makes the golden files of one release by scalar code alone: plain Python, hashlib and struct.

    python tests/golden/make.py 0.1.0

No kernel, reader or writer of the package has a part in it; only `kilodelta.exact.reference`,
the format in plain Python. The files are kept for ever.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import sys
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np

from kilodelta.exact import reference
from kilodelta.format.methods import METHODS

SEED = 0x0123456789ABCDEF
BASE: dict[str, tuple[str, tuple[int, ...]]] = {
    "conv.weight": ("F32", (5, 2, 2, 1)),
    "h.c_fc.weight": ("F16", (6, 9)),
    "norm.bias": ("F32", (4,)),
    "tall.weight": ("BF16", (11, 4)),
    "wide.weight": ("F16", (3, 130)),
}
TRANSPOSED = "h.*"
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "nola-8": ({"name": "nola", "rank": 2, "bases": 131, "basis": "sign"}, 8),
    "nola-16": ({"name": "nola", "rank": 2, "bases": 5, "basis": "sign"}, 16),
    "randlora-8": ({"name": "randlora", "rank": 3, "basis": "sign"}, 8),
    "randlora-4": ({"name": "randlora", "rank": 2, "basis": "ternary", "sparsity": 3}, 4),
    "lora-4": ({"name": "lora", "rank": 1}, 4),
    "lora-8": ({"name": "lora", "rank": 3}, 8),
    "vera-8": ({"name": "vera", "rank": 4}, 8),
    "unilora-4": ({"name": "unilora", "rank": 2, "bases": 37, "anchor": 5}, 4),
    "unilora-16": ({"name": "unilora", "rank": 3, "bases": 8, "anchor": 0}, 16),
}


class Numbers:
    """A plain linear congruential generator, so that nothing depends on a library's."""

    def __init__(self, state: int) -> None:
        self.state = state

    def below(self, limit: int) -> int:
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (self.state >> 33) % limit


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> bytes:
    parts = (name.encode(), dtype.encode(), ",".join(map(str, shape)).encode(), data)
    return hashlib.sha256(b"\0".join(parts)).digest()


def container(tensors: list[tuple[str, str, tuple[int, ...], bytes]], metadata: Any) -> bytes:
    table: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for name, dtype, shape, data in tensors:
        span = [position, position + len(data)]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": span}
        position += len(data)
    text = canonical(table).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(data for *_, data in tensors)


def base_tensors() -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    numbers, found = Numbers(1), {}
    for name, (dtype, shape) in BASE.items():
        bits = []
        for _ in range(prod(shape)):
            value = np.float32((numbers.below(4001) - 2000) / 8192)
            bits.append(reference.round_to(dtype, value))
        letter = "I" if dtype == "F32" else "H"
        found[name] = (dtype, shape, struct.pack(f"<{len(bits)}{letter}", *bits))
    return found


def made_by(options: dict[str, Any]) -> Any:
    """The method of a manifest's options."""
    return METHODS[options["name"]](**{k: v for k, v in options.items() if k != "name"})


def group_shapes(method: dict[str, Any], out: int, in_: int) -> list[tuple[str, tuple[int, ...]]]:
    rank = method["rank"]
    n = ceil(min(out, in_) / rank)
    shapes: dict[str, list[tuple[str, tuple[int, ...]]]] = {
        "nola": [("alpha", (method.get("bases", 0),)), ("beta", (method.get("bases", 0),))],
        "randlora": [("lambda", (n, rank)), ("gamma", (n, min(out, in_)))],
        "lora": [("A", (rank, in_)), ("B", (out, rank))],
        "vera": [("lambda", (rank,)), ("b", (out,))],
        "unilora": [("size", (0,))],
    }
    return shapes[method["name"]]


def pack(values: list[int], bits: int) -> bytes:
    if bits == 16:
        return struct.pack(f"<{len(values)}h", *values)
    if bits == 8:
        return struct.pack(f"{len(values)}b", *values)
    padded = values + [0] * (len(values) % 2)
    return bytes((low & 15) | (high & 15) << 4 for low, high in zip(padded[::2], padded[1::2]))  # noqa: B905


def nested(values: list[int], shape: tuple[int, ...]) -> Any:
    if len(shape) == 1:
        return values
    width = prod(shape[1:])
    return [nested(values[i * width : (i + 1) * width], shape[1:]) for i in range(shape[0])]


def case(name: str, base: dict[str, tuple[str, tuple[int, ...], bytes]]) -> tuple[bytes, Any]:
    """A file's bytes, and what a reader must find in it."""
    method, bits = CASES[name]
    numbers = Numbers(sum(name.encode()))
    top = (1 << (bits - 1)) - 1
    targets = [n for n in sorted(base) if len(base[n][1]) >= 2]
    blob, scales = b"", b""
    shared: dict[str, Any] = {}
    size_e = -12 if bits == 4 else -26 if bits == 16 else -22
    if method["name"] == "unilora":
        theta = [numbers.below(2 * top + 1) - top for _ in range(method["bases"])]
        shared["theta"], blob, scales = theta, pack(theta, bits), bytes((3, (-4) & 255))
    expected: dict[str, Any] = {}
    digests = []
    for index, target in enumerate(targets):
        dtype, shape, data = base[target]
        stored = (shape[0], prod(shape[1:]))
        turned = target.startswith("h.")
        out, in_ = stored[::-1] if turned else stored
        q, own = dict(shared), []
        for group, dims in group_shapes(method, out, in_):
            values = [numbers.below(2 * top + 1) - top for _ in range(prod(dims))]
            q[group] = nested(values, dims) if dims != (0,) else []
            c, e = 1 + numbers.below(7), size_e // 2 - numbers.below(3)
            own.append((c, e))
            blob, scales = blob + pack(values, bits), scales + bytes((c, e & 255))
        C, e_all = prod(c for c, _ in own), sum(e for _, e in own)
        if shared:
            C, e_all = C * 9, e_all - 8
        dq = made_by(method).scalar(q, (out, in_), SEED, index)
        merged = reference.merge(dtype, data, shape, turned, C, e_all, dq)
        digests.append(digest(target, dtype, shape, merged))
        expected[target] = {"dq": dq, "c": C, "e": e_all, "merged": merged.hex()}
    extra = struct.pack("<4f", 0.5, -1.0, 2.0, 0.25)
    manifest = {
        "version": 1,
        "base": {
            "name": "golden",
            "root": root([digest(n, *base[n]) for n in sorted(base)]),
            "tensors": len(base),
        },
        "method": method,
        "seed": str(SEED),
        "targets": {
            "include": ["*.weight"],
            "exclude": [],
            "transposed": [TRANSPOSED],
            "count": len(targets),
        },
        "coefficients": {"bits": bits, "scales": base64.b64encode(scales).decode()},
        "extras": ["norm.bias"],
        "result": {"root": root(digests)},
        "made": {"tool": "golden", "agreement": 0.75},
    }
    tensors: list[tuple[str, str, tuple[int, ...], bytes]] = [
        ("extra.norm.bias", "F32", (4,), extra),
        ("coefficients", "U8", (len(blob),), blob),
    ]
    text = canonical(manifest)
    inside = root([digest(*tensor) for tensor in sorted(tensors)])
    whole = "sha256:" + hashlib.sha256(text.encode() + b"\0" + inside.encode()).hexdigest()
    file = container(tensors, {"kilodelta": text, "kilodelta.digest": whole})
    return file, {"result": root(digests), "targets": expected}


def root(digests: list[bytes]) -> str:
    return "sha256:" + hashlib.sha256(b"".join(digests)).hexdigest()


def main() -> None:
    folder = Path(__file__).parent / sys.argv[1]
    folder.mkdir()
    base = base_tensors()
    tensors: list[Any] = [(n, *base[n]) for n in base]
    (folder / "base.safetensors").write_bytes(container(tensors, {"format": "pt"}))
    for name in CASES:
        file, expected = case(name, base)
        (folder / f"{name}.kd").write_bytes(file)
        (folder / f"{name}.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    main()
