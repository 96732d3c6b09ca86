"""Compute a model's identity from its files, or from its tensors in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kilodelta import parallel
from kilodelta.errors import CheckpointError, InputError
from kilodelta.files import digest_cache, tying
from kilodelta.files.checkpoint import Checkpoint, Shard
from kilodelta.files.identity import Identity, of_digests, raw_digest, tensor_hash
from kilodelta.files.safetensors import Entry
from kilodelta.files.tensor import RawTensor
from kilodelta.progress import Meter, Progress, silent


def digest(
    model: Any, *, cached: bool = False, threads: int | None = None, progress: Progress = silent
) -> Identity:
    """Compute the identity of a model; the same tensors give the same root.

    Args:
        model: a path (`.safetensors` file or Hugging Face folder), a `Checkpoint`, an
            `nn.Module`, or a mapping from names to torch tensors or numpy arrays.
        cached: take the digests remembered for a file whose device, inode, size and times are
            unchanged. That is a hint, not a proof: writes through a memory map change none of them.
        threads: cores to hash on; all by default.
        progress: called with how many bytes are hashed.

    Raises:
        CheckpointError: the files cannot be read, or changed while they were.
        InputError: `model` is none of these.

    Example:
        >>> digest("tests/golden/0.1.0/base.safetensors").root[:23]
        'sha256:9f1dd3248b11b72d'
    """
    if isinstance(model, (str, os.PathLike, Checkpoint)):
        checkpoint = Checkpoint.open(model)
        return _of_checkpoint(checkpoint, cached=cached, threads=threads, progress=progress)
    return _of_memory(model)


def _of_checkpoint(
    checkpoint: Checkpoint, *, cached: bool, threads: int | None, progress: Progress
) -> Identity:
    remembered = {s.path: digest_cache.load(s) if cached else None for s in checkpoint.shards}
    missing = [shard for shard in checkpoint.shards if remembered[shard.path] is None]
    fresh = _hash_shards(missing, threads, progress)
    for shard in missing:
        if not shard.file.is_unchanged():
            raise CheckpointError(
                f"{shard.path} changed while it was read",
                fix="wait until nothing writes to it, and start again",
            )
        digest_cache.store(shard, fresh[shard.path])
    known = {path: tensors for path, tensors in remembered.items() if tensors is not None}
    both = [*known.values(), *fresh.values()]
    return of_digests({name: text for tensors in both for name, text in tensors.items()})


def _hash_shards(
    shards: list[Shard], threads: int | None, progress: Progress
) -> dict[Path, dict[str, str]]:
    work = [(shard, entry) for shard in shards for entry in shard.layout.entries]
    meter = Meter("hash", sum(entry.nbytes for _, entry in work), "B", progress)
    digests = parallel.run(
        lambda item: hash_entry(*item, meter),
        work,
        meter,
        threads=threads,
        weight=lambda item: item[1].nbytes,
    )
    found: dict[Path, dict[str, str]] = {shard.path: {} for shard in shards}
    for (shard, entry), text in zip(work, digests, strict=True):
        found[shard.path][entry.name] = text
    return found


def hash_entry(shard: Shard, entry: Entry, meter: Meter) -> str:
    """Compute the digest of one tensor of a file, telling `meter` the bytes.

    Raises:
        CheckpointError: the file was cut, or cannot be read.
    """
    state = tensor_hash(entry.name, entry.dtype, entry.shape)
    for part in shard.tensor(entry).chunks():
        state.update(part.data)
        meter.add(part.size)
    return "sha256:" + state.hexdigest()


def _of_memory(model: Any) -> Identity:
    tensors = _state(model)
    ordered = {name: tensors[name] for name in tying.file_order(model, tensors)}
    return of_digests(
        {name: raw_digest(name, RawTensor.of(v)) for name, v in tying.untied(ordered).items()}
    )


def _state(model: Any) -> Mapping[str, Any]:
    state = model.state_dict() if hasattr(model, "state_dict") else model
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise InputError(
            f"a {type(model).__name__} is not a model",
            fix="give a path, an nn.Module, or a mapping from names to tensors",
        )
    return state
