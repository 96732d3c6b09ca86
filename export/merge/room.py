"""Count what a merge writes, before the base is read, so that a disk is asked for it first."""

from __future__ import annotations

from pathlib import Path

from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.staging import Need
from kilodelta.format.delta import Delta
from kilodelta.grid.model import QuantisedModel
from kilodelta.grid.onnx_source import OnnxSource


def merged_need(place: Path, base: Checkpoint | QuantisedModel, delta: Delta) -> Need:
    """Count the bytes of a merged model's weights.

    Args:
        place: the output, a file or a folder.
        base: a checkpoint, or a quantised model of any kind.
        delta: made for it; it need not be bound.
    """
    return Need(path=place, nbytes=_merged_bytes(base, delta), what="the merged weights")


def _merged_bytes(base: Checkpoint | QuantisedModel, delta: Delta) -> int:
    if isinstance(base, Checkpoint):
        return _checkpoint_bytes(base, delta)
    source = base.source
    if isinstance(source, Checkpoint):
        return _checkpoint_bytes(source, delta)
    beside = source.external_bytes if isinstance(source, OnnxSource) else 0
    return base.path.stat().st_size + beside


def _checkpoint_bytes(base: Checkpoint, delta: Delta) -> int:
    entries = [entry for shard in base.shards for entry in shard.layout.entries]
    kept = sum(entry.nbytes for entry in entries if entry.name not in delta.extras)
    heads = sum(len(shard.head) for shard in base.shards)
    return heads + kept + sum(tensor.nbytes for tensor in delta.extras.values())
