"""Merge into the grid of a GGUF file: the file is copied, and only codes are written anew."""

from __future__ import annotations

import os
from pathlib import Path

from kilodelta.errors import CheckpointError, InputError
from kilodelta.export.merge.in_grid import Tally, merge_weight, proved_parts
from kilodelta.export.merge.tensor import merged_tensor, require_result
from kilodelta.files import identity
from kilodelta.files.copying import copy_range, pwrite
from kilodelta.files.identity import Identity
from kilodelta.format.delta import Delta
from kilodelta.grid.gguf.file import GgufSource
from kilodelta.grid.model import QuantisedModel
from kilodelta.progress import Meter, Progress

_PIECE = 1 << 26


def write_gguf(
    model: QuantisedModel, stored: Identity, delta: Delta, stage: Path, progress: Progress
) -> Tally:
    """Write the merged file, one weight after the other.

    Args:
        model: the base, opened from a `.gguf` file.
        stored: the identity over its stored tensors, just proved.
        delta: bound to it.
        stage: the new file.
        progress: receives how far the work is, in bytes.

    Raises:
        InputError: the delta stores a tensor whole for which the file has no place of that size.
        ProofError: the merged targets are not the ones that the delta promises.
        CheckpointError, BaseMismatchError: the base cannot be read, or changes meanwhile.
    """
    source = model.source
    assert isinstance(source, GgufSource)  # the caller looked at the suffix
    require_places(model, delta)
    meter = Meter("merge", source.file.size, "B", progress)
    tally, digests = Tally(), {}
    with model.path.open("rb") as base, stage.open("w+b") as out:
        _copy(base.fileno(), out.fileno(), source.file.size, meter)
        for name in delta.tensors:
            if name in model.stored:
                place = model.of(name).codes
                parts = proved_parts(model, stored, name)
                packed, digests[name] = merge_weight(delta, model, name, parts, tally)
            else:
                where = model.place_of(name)
                merged = merged_tensor(delta, name, lambda n: model.plain_raw(n).data)
                digests[name] = identity.raw_digest(name, merged)
                place, packed = where.place, where.write(merged)
            pwrite(out.fileno(), packed.data.data, source.offset(place))
        for name, tensor in delta.extras.items():
            where = model.place_of(name)
            pwrite(out.fileno(), where.write(tensor).data.data, source.offset(where.place))
    require_result(delta, digests)
    if not source.file.is_unchanged():
        raise CheckpointError(
            f"{model.path} changed while it was read",
            fix="wait until nothing writes to it, and start again",
        )
    return tally


def require_places(model: QuantisedModel, delta: Delta) -> None:
    """Check that each tensor which a delta stores whole takes the place of one like it.

    Raises:
        InputError: the GGUF file has none of that name, type and shape, or has it quantised.
    """
    for name, tensor in delta.extras.items():
        info = model.plain_info(name) if name in model.plain else None
        if info is None or (info.dtype, info.shape) != (tensor.dtype, tensor.shape):
            raise InputError(
                f"the file stores {name} whole ({tensor.dtype} {list(tensor.shape)}), and a GGUF"
                " file, which is only changed in place, has no such tensor",
                fix="compress anew with --extras none, or merge into the checkpoint and convert"
                " that with llama.cpp",
            )


def _copy(source: int, target: int, size: int, meter: Meter) -> None:
    os.ftruncate(target, size)
    position = 0
    while position < size:
        count = copy_range(source, target, min(_PIECE, size - position), position, position)
        if not count:
            return
        position += count
        meter.add(count)
