"""The identity of a model: one SHA-256 root over its tensors, whatever files they lie in.

`tensor digest = H(name 0x00 dtype 0x00 shape 0x00 bytes)`, `root = H(digests in name order)`
(docs/format.md, section 4).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kilodelta.errors import InputError
from kilodelta.files import digest_cache, parallel
from kilodelta.files.checkpoint import Checkpoint, Shard, in_name_order
from kilodelta.files.safetensors import Entry
from kilodelta.files.tensor import RawTensor
from kilodelta.progress import Meter, Progress, silent

CHUNK = 16 << 20
"""Bytes hashed between two reports of progress."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A model's root and its tensors' digests, each `sha256:<hex>`."""

    root: str
    tensors: Mapping[str, str]


def tensor_hash(name: str, dtype: str, shape: tuple[int, ...]) -> hashlib._Hash:
    """A SHA-256 that has taken a tensor's name, dtype and shape; its bytes come next."""
    decimals = ",".join(map(str, shape))
    return hashlib.sha256(b"\0".join((name.encode(), dtype.encode(), decimals.encode(), b"")))


def tensor_digest(name: str, dtype: str, shape: tuple[int, ...], data: Any) -> str:
    """The digest of one tensor; `data` is any buffer of its raw little-endian bytes."""
    state = tensor_hash(name, dtype, shape)
    state.update(data)
    return "sha256:" + state.hexdigest()


def raw_digest(name: str, tensor: RawTensor) -> str:
    """The digest of one tensor in memory under a name."""
    return tensor_digest(name, tensor.dtype, tensor.shape, tensor.data)


def root(digests: Iterable[str]) -> str:
    """The root over tensor digests that already stand in name order."""
    state = hashlib.sha256()
    for text in digests:
        state.update(bytes.fromhex(text.removeprefix("sha256:")))
    return "sha256:" + state.hexdigest()


def of_digests(tensors: Mapping[str, str]) -> Identity:
    """The identity of a model whose tensor digests are known, in any order."""
    ordered = {name: tensors[name] for name in in_name_order(tensors)}
    return Identity(root=root(ordered.values()), tensors=ordered)


def fingerprints(known: Identity) -> bytes:
    """Two bytes a tensor in name order: of its name's SHA-256 and of its digest, the first ones."""
    return b"".join(
        hashlib.sha256(name.encode("utf-8")).digest()[:1] + bytes.fromhex(text[7:9])
        for name, text in known.tensors.items()
    )


def digest(
    model: Any, *, cache: bool = True, threads: int | None = None, progress: Progress = silent
) -> Identity:
    """The identity of a model on disk or in memory; the same tensors give the same root.

    Args:
        model: a path (`.safetensors` file or Hugging Face folder), a `Checkpoint`, an
            `nn.Module`, or a mapping from names to torch tensors or numpy arrays.
        cache: trust the digests remembered for a file whose device, inode, size and times are
            unchanged. A proof must not.
        threads: cores to hash on; all by default.

    Raises:
        CheckpointError: the files cannot be read.
        InputError: `model` is none of these.
    """
    if isinstance(model, (str, os.PathLike, Checkpoint)):
        checkpoint = Checkpoint.open(Path(model) if not isinstance(model, Checkpoint) else model)
        return _of_checkpoint(checkpoint, cache=cache, threads=threads, progress=progress)
    return _of_memory(model)


def _of_checkpoint(
    checkpoint: Checkpoint, *, cache: bool, threads: int | None, progress: Progress
) -> Identity:
    known = {s.path: digest_cache.load(s.path) if cache else None for s in checkpoint.shards}
    missing = [shard for shard in checkpoint.shards if known[shard.path] is None]
    before = {shard.path: digest_cache.key(shard.path) for shard in missing}
    fresh = _hash_shards(missing, threads, progress)
    for path, tensors in fresh.items():
        digest_cache.store(path, before[path], tensors)
    found = {**{path: t for path, t in known.items() if t is not None}, **fresh}
    return of_digests({name: text for tensors in found.values() for name, text in tensors.items()})


def _hash_shards(
    shards: list[Shard], threads: int | None, progress: Progress
) -> dict[Path, dict[str, str]]:
    work = [(shard, entry) for shard in shards for entry in shard.layout.entries]
    meter = Meter("hash", sum(entry.nbytes for _, entry in work), "B", progress)
    digests = parallel.run(
        lambda item: hash_mapped(*item, meter),
        work,
        meter,
        threads=threads,
        weight=lambda item: item[1].nbytes,
    )
    found: dict[Path, dict[str, str]] = {shard.path: {} for shard in shards}
    for (shard, entry), text in zip(work, digests, strict=True):
        found[shard.path][entry.name] = text
    return found


def hash_mapped(shard: Shard, entry: Entry, meter: Meter) -> str:
    """The digest of one tensor of a mapped file."""
    state = tensor_hash(entry.name, entry.dtype, entry.shape)
    view = memoryview(shard.data)[entry.begin : entry.end]
    for start in range(0, len(view), CHUNK):
        part = view[start : start + CHUNK]
        state.update(part)
        meter.add(len(part))
    return "sha256:" + state.hexdigest()


def _of_memory(model: Any) -> Identity:
    tensors = _state(model)
    tied = _tied_away(model, tensors)
    return of_digests(
        {n: raw_digest(n, RawTensor.of(v)) for n, v in tensors.items() if n not in tied}
    )


def _state(model: Any) -> Mapping[str, Any]:
    state = model.state_dict() if hasattr(model, "state_dict") else model
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise InputError(
            f"a {type(model).__name__} is not a model",
            fix="give a path, an nn.Module, or a mapping from names to tensors",
        )
    return state


def _tied_away(model: Any, tensors: Mapping[str, Any]) -> set[str]:
    """Names that count under another name: tied tensors count once, under the name that the
    model's own files keep (transformers declares the others), else the first one."""
    declared = set(getattr(model, "_tied_weights_keys", None) or ())
    kept: dict[tuple[Any, ...], str] = {}
    away: set[str] = set()
    for name in sorted(tensors, key=lambda n: (n in declared, n.encode("utf-8"))):
        place = _place(tensors[name])
        if place is not None and kept.setdefault(place, name) != name:
            away.add(name)
    return away


def _place(value: Any) -> tuple[Any, ...] | None:
    """Where a tensor lies in memory; None for an empty one."""
    if isinstance(value, np.ndarray):
        interface = value.__array_interface__
        return (interface["data"][0], value.shape, str(value.dtype)) if value.size else None
    if not hasattr(value, "data_ptr") or value.numel() == 0:
        return None
    return (value.data_ptr(), tuple(value.shape), str(value.dtype))
