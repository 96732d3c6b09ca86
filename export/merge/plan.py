"""Plan where each byte of a merged checkpoint comes from, before anything is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kilodelta.files.checkpoint import Checkpoint, Shard
from kilodelta.files.safetensors import Entry, header_bytes
from kilodelta.files.tensor import RawTensor, TensorInfo
from kilodelta.format.delta import Delta


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One tensor of an output file: `nbytes` from byte `begin` on, and what writes them.

    A target is merged, an extra is stored, every other tensor is copied from the base.
    """

    kind: Literal["merge", "store", "copy"]
    name: str
    begin: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class FilePlan:
    """One output file: its header and its tensors in the order of their offsets."""

    path: Path
    header: bytes
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """The file's bytes."""
        return len(self.header) + sum(piece.nbytes for piece in self.pieces)


def plan_files(
    checkpoint: Checkpoint, delta: Delta, stage: Path, *, single: bool
) -> list[FilePlan]:
    """Plan all files of a merged model, in the base's sharding.

    Tensors that the base lacks go into the last file.

    Args:
        checkpoint: the base.
        delta: bound to it.
        stage: the output file where `single`, else the folder of the output files.
        single: write one file.
    """
    added = {name: tensor for name, tensor in delta.extras.items() if name not in checkpoint}
    last = checkpoint.shards[-1]
    return [
        _plan_file(
            shard,
            delta,
            stage if single else stage / shard.path.name,
            added if shard is last else {},
        )
        for shard in checkpoint.shards
    ]


def _plan_file(shard: Shard, delta: Delta, path: Path, added: Mapping[str, RawTensor]) -> FilePlan:
    order = [_merged_info(entry, delta) for entry in shard.layout.entries]
    same = not added and all(
        info is entry for info, entry in zip(order, shard.layout.entries, strict=True)
    )
    order += [tensor.info(name) for name, tensor in added.items()]
    header = shard.head if same else header_bytes(order, shard.layout.metadata)
    pieces, begin = [], len(header)
    for info in order:
        kind: Literal["merge", "store", "copy"] = "copy"
        if info.name in delta.extras:
            kind = "store"
        elif info.name in delta.tensors:
            kind = "merge"
        pieces.append(Piece(kind=kind, name=info.name, begin=begin, nbytes=info.nbytes))
        begin += info.nbytes
    return FilePlan(path=path, header=header, pieces=tuple(pieces))


def _merged_info(entry: Entry, delta: Delta) -> TensorInfo:
    """Return what a base tensor is in the merged model; the entry itself where nothing changes."""
    extra = delta.extras.get(entry.name)
    if extra is None or (extra.dtype, extra.shape) == (entry.dtype, entry.shape):
        return entry
    return extra.info(entry.name)


def merged_index(checkpoint: Checkpoint, delta: Delta) -> bytes:
    """Bring the base's index (`model.safetensors.index.json`) up to date.

    Only where tensors are added or change their size; empty where the base has none.
    """
    added = [name for name in delta.extras if name not in checkpoint]
    resized = [
        name
        for name, tensor in delta.extras.items()
        if name in checkpoint and tensor.nbytes != checkpoint.info(name).nbytes
    ]
    if checkpoint.index is None or not (added or resized):
        return checkpoint.index or b""
    index = json.loads(checkpoint.index)
    index["weight_map"] |= {name: checkpoint.shards[-1].path.name for name in added}
    kept = sum(checkpoint.info(n).nbytes for n in checkpoint.names if n not in delta.extras)
    stored = sum(tensor.nbytes for tensor in delta.extras.values())
    other = index.get("metadata")  # of any type: transformers reads nothing of it but its size
    index["metadata"] = {**(other if isinstance(other, dict) else {}), "total_size": kept + stored}
    return json.dumps(index, indent=2, sort_keys=True).encode("utf-8") + b"\n"
