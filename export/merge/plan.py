"""Where each byte of a merged checkpoint comes from, before anything is written."""

from __future__ import annotations

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
    """A run of bytes of an output file: merged, stored whole, or copied from `source` on."""

    kind: Literal["merge", "extra", "copy"]
    name: str
    begin: int
    nbytes: int
    source: int = 0


@dataclass(frozen=True, kw_only=True)
class FilePlan:
    """One output file: its header, its pieces, and the base file that it follows."""

    path: Path
    source: Path
    header: bytes
    size: int
    pieces: tuple[Piece, ...]


def plan_checkpoint(
    checkpoint: Checkpoint, delta: Delta, stage: Path, *, single: bool
) -> list[FilePlan]:
    """Plans for all files of a merged model; tensors that the base lacks go into the last one."""
    added = {name: tensor for name, tensor in delta.extras.items() if name not in checkpoint}
    last = checkpoint.shards[-1]
    return [
        _plan_shard(
            shard,
            delta,
            stage if single else stage / shard.path.name,
            added if shard is last else {},
        )
        for shard in checkpoint.shards
    ]


def _plan_shard(shard: Shard, delta: Delta, path: Path, added: Mapping[str, RawTensor]) -> FilePlan:
    replaced = {e.name for e in shard.layout.entries if e.name in delta.extras}
    order = [_new_kind(e, delta) for e in shard.layout.entries]
    order += [tensor.info(name) for name, tensor in added.items()]
    same = not added and all(
        (old.dtype, old.shape) == (new.dtype, new.shape)
        for old, new in zip(shard.layout.entries, order, strict=True)
    )
    header = shard.data[: shard.layout.data_start] if same else _header(order, shard)
    pieces = _pieces(shard, delta, order, len(header), replaced | set(added))
    return FilePlan(
        path=path,
        source=shard.path,
        header=header,
        size=len(header) + sum(info.nbytes for info in order),
        pieces=tuple(pieces),
    )


def _new_kind(entry: Entry, delta: Delta) -> TensorInfo:
    extra = delta.extras.get(entry.name)
    return extra.info(entry.name) if extra else entry


def _header(order: list[TensorInfo], shard: Shard) -> bytes:
    return header_bytes(order, shard.layout.metadata)


def _pieces(
    shard: Shard,
    delta: Delta,
    order: list[TensorInfo],
    start: int,
    whole: set[str],
) -> list[Piece]:
    entries = {entry.name: entry for entry in shard.layout.entries}
    pieces: list[Piece] = []
    for info in order:
        name, size = info.name, info.nbytes
        if name in whole:
            pieces.append(Piece(kind="extra", name=name, begin=start, nbytes=size))
        elif name in delta.targets:
            pieces.append(Piece(kind="merge", name=name, begin=start, nbytes=size))
        else:
            _append_copy(pieces, entries[name], start)
        start += size
    return pieces


def _append_copy(pieces: list[Piece], entry: Entry, begin: int) -> None:
    """Add a copied tensor, in one run with the one before where both lie side by side."""
    last = pieces[-1] if pieces else None
    if (
        last is not None
        and last.kind == "copy"
        and last.source + last.nbytes == entry.begin
        and last.begin + last.nbytes == begin
    ):
        begin, source, size = last.begin, last.source, last.nbytes + entry.nbytes
        pieces[-1] = Piece(kind="copy", name=last.name, begin=begin, nbytes=size, source=source)
        return
    pieces.append(
        Piece(kind="copy", name=entry.name, begin=begin, nbytes=entry.nbytes, source=entry.begin)
    )
