"""Small bases and deltas for tests, built on the spot."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kilodelta.files import canonical
from kilodelta.files.safetensors import header_bytes
from kilodelta.files.tensor import RawTensor, TensorInfo
from kilodelta.format.delta import Delta
from kilodelta.format.methods import Lora, Method, Nola, RandLora, UniLora, Vera
from kilodelta.format.quantise import Quantised, quantise
from kilodelta.format.targets import Patterns
from kilodelta.merging import build

Tensors = Mapping[str, tuple[str, tuple[int, ...], bytes]]

METHODS: tuple[Method, ...] = (
    Nola(rank=3, bases=130),
    RandLora(rank=7),
    RandLora(rank=5, basis="ternary", sparsity=3),
    Lora(rank=2),
    Vera(rank=6),
    UniLora(rank=3, bases=50, anchor=9),
)


def ids(value: object) -> str:
    """A short name for a parametrised method."""
    return f"{getattr(value, 'name', value)}{'-ternary' if getattr(value, 'sparsity', 0) else ''}"


def bits_of(dtype: str, values: np.ndarray[Any, Any]) -> bytes:
    """float32 values as the bytes of a tensor; bfloat16 by truncation."""
    floats = values.astype(np.float32)
    if dtype == "BF16":
        return (floats.view(np.uint32) >> 16).astype("<u2").tobytes()
    return floats.astype("<f2" if dtype == "F16" else "<f4").tobytes()


def model(seed: int = 0) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """A base with a wide, a tall, a transposed, a convolution, an embedding and other tensors."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "conv.weight": ("F32", (8, 3, 2, 2)),
        "embed.weight": ("BF16", (30, 10)),
        "h.0.c_attn.weight": ("F16", (12, 20)),
        "tall.weight": ("BF16", (20, 9)),
        "wide.weight": ("F16", (9, 21)),
        "norm.weight": ("F32", (9,)),
        "norm.bias": ("F32", (9,)),
    }
    made = {n: (d, s, bits_of(d, rng.normal(size=s) * 0.1)) for n, (d, s) in shapes.items()}
    made["count"] = ("I64", (), np.int64(7).tobytes())
    return made


PATTERNS = Patterns(include=("*.weight",), exclude=("norm*",), transposed=("h.*",))


def write(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file with the tensors in the order given."""
    order = [
        TensorInfo(name=name, dtype=dtype, shape=shape)
        for name, (dtype, shape, _) in tensors.items()
    ]
    data = b"".join(raw for _, _, raw in tensors.values())
    path.write_bytes(header_bytes(order, metadata or {"format": "pt"}) + data)
    return path


def folder(path: Path, tensors: Tensors, shards: int = 1) -> Path:
    """A Hugging Face folder with a configuration and a tokenizer, in one file or several."""
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "x"}')
    (path / "tokenizer").mkdir()
    (path / "tokenizer" / "vocab.txt").write_text("a\nb\n")
    names = list(tensors)
    if shards == 1:
        write(path / "model.safetensors", tensors)
        return path
    weight_map = {}
    for part in range(shards):
        name = f"model-{part + 1:05}-of-{shards:05}.safetensors"
        chosen = {n: tensors[n] for n in names[part::shards]}
        weight_map.update(dict.fromkeys(chosen, name))
        write(path / name, chosen)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def numbers(
    method: Method, base: Path, patterns: Patterns = PATTERNS, bits: int = 8, seed: int = 1
) -> tuple[dict[str, dict[str, Quantised]], dict[str, Quantised]]:
    """Random coefficients whose updates are about as large as the weights."""
    rng = np.random.default_rng(seed)
    shared = {g.name: quantise(rng.normal(size=g.shape), bits, 15) for g in method.shared()}
    own = {}
    for target in build.targets(base, patterns):
        floats: dict[str, Any] = {
            g.name: rng.normal(size=g.shape) * 0.05 if g.size else np.float64(0.01)
            for g in method.groups(target)
        }
        own[target.name] = build.quantise_target(method, floats, bits, shared)
    return own, shared


def delta(
    base: Path,
    method: Method,
    *,
    patterns: Patterns = PATTERNS,
    bits: int = 8,
    seed: int = 2**63 + 5,
    extras: Mapping[str, RawTensor] | None = None,
) -> Delta:
    """A whole delta with random coefficients."""
    own, shared = numbers(method, base, patterns, bits)
    recipe = build.Recipe(
        method=method,
        patterns=patterns,
        seed=seed,
        bits=bits,
        name="test/base",
        extras=extras or {},
        made={"tool": "test", "agreement": 0.5},
    )
    return build.build(base, recipe, own, shared)


def forge(path: Path, tensors: Tensors, manifest: str, **metadata: str) -> Path:
    """A file with a right digest around whatever content, to get past the first check."""
    names = sorted(tensors, key=str.encode)
    digests = b"".join(
        hashlib.sha256(
            b"\0".join((n.encode(), d.encode(), ",".join(map(str, s)).encode(), raw))
        ).digest()
        for n in names
        for d, s, raw in [tensors[n]]
    )
    root = "sha256:" + hashlib.sha256(digests).hexdigest()
    whole = hashlib.sha256(manifest.encode() + b"\0" + root.encode()).hexdigest()
    known = {"kilodelta": manifest, "kilodelta.digest": "sha256:" + whole, **metadata}
    width = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1}
    order = sorted(names, key=lambda name: -width[tensors[name][0]])
    return write(path, {name: tensors[name] for name in order}, known)


def reforged(path: Path, source: Delta, change: Any) -> Path:
    """A delta's file with its manifest changed by a function of the parsed JSON."""
    table = json.loads(source.manifest.text())
    change(table)
    tensors: dict[str, Any] = {"coefficients": ("U8", (source.blob.size,), source.blob.tobytes())}
    for name, tensor in source.extras.items():
        tensors["extra." + name] = (tensor.dtype, tensor.shape, tensor.data.tobytes())
    return forge(path, tensors, canonical.dumps(table))


__all__ = ["METHODS", "PATTERNS", "delta", "folder", "forge", "ids", "model", "reforged", "write"]
