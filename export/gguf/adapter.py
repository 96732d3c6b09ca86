"""A low-rank delta as a GGUF LoRA adapter, by the `gguf` package.

Source: llama.cpp's `convert_lora_to_gguf.py` and `llama-adapter.cpp`: tensors `NAME.lora_a` (r, in)
and `NAME.lora_b` (out, r), applied as scale * alpha / r * B A with r from the tensor. All tensors
get one rank and alpha equals it, so the factor is the scale alone. The file cannot name its base:
llama.cpp adds it to any model of the same shapes, and the digests in it are for readers like us.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kilodelta.errors import ExportError, InputError, OutputError, require
from kilodelta.export.gguf.names import Naming
from kilodelta.export.peft.factors import (
    FactorPair,
    factor_pairs,
    padded,
    relative_error,
    require_low_rank,
    top_rank,
)
from kilodelta.files import staging
from kilodelta.files.baseline import require_base
from kilodelta.files.checkpoint import Checkpoint, read_config
from kilodelta.files.dtypes import PRECISIONS
from kilodelta.format.delta import Delta
from kilodelta.format.file import load
from kilodelta.models.hub import locate, locate_delta
from kilodelta.progress import Progress, silent
from kilodelta.rehearsal import begin_work

DTYPES = ("float32", "float16")
MAX_SVD = 4096


@dataclass(frozen=True, kw_only=True)
class GgufAdapter:
    """What was written.

    Attributes:
        path: the file.
        architecture: llama.cpp's name of the base's.
        targets: matrices that it changes.
        rank: of every one of them.
        error: Frobenius norm of what rounding and truncation lost, over the update's.
        nbytes: size of the file.
    """

    path: Path
    architecture: str
    targets: int
    rank: int
    error: float
    nbytes: int

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**vars(self), "path": str(self.path)}


def export_gguf(
    base: str | os.PathLike[str] | Checkpoint,
    delta: str | os.PathLike[str] | Delta,
    out: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    svd: int | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress = silent,
) -> GgufAdapter:
    """Write a delta as a LoRA adapter for llama.cpp.

    Args:
        base: the model the delta is for, a folder with its `config.json`.
        delta: a `.kd` file.
        out: the `.gguf` file to write.
        dtype: of the factors, float32 or float16; any goes with a quantised base.
        svd: truncate every update to this rank, for deltas of full rank.
        force: replace `out`.
        threads: None for one per core.
        progress: called with what is computed.

    Raises:
        BaseMismatchError: `base` is another model.
        ExportError: the architecture is not known, a tensor has no place in an adapter, or the
            updates have full rank.
        InputError: an option makes no sense.
        OutputError: `out` exists, or cannot be written.
        MissingPackageError: `gguf` is not installed.
    """
    if dtype not in DTYPES:
        raise InputError(f"adapters are not written in {dtype!r}", fix="choose float32 or float16")
    if svd is not None and not 1 <= svd <= MAX_SVD:
        raise InputError(f"rank {svd} makes no sense", fix=f"choose 1 to {MAX_SVD}")
    place = Path(out)
    if place.exists() and not force:
        raise OutputError(f"{place} exists already", fix="give a new name, or --force")
    checkpoint = Checkpoint.open(locate(base) if isinstance(base, str) else base)
    given = delta if isinstance(delta, Delta) else load(locate_delta(delta))
    naming = Naming(read_config(checkpoint))
    names = _names(given.bind(checkpoint), naming)
    require_base(checkpoint, given.manifest.base, threads=threads, progress=progress)
    bound = given.bind(checkpoint)
    if svd is None:
        require_low_rank(bound)
    begin_work(place, targets=f"{len(bound.targets)} tensors", rank=svd or "exact")
    name = PRECISIONS[dtype].name
    pairs = factor_pairs(bound, name, svd, threads=threads, progress=progress)
    rank = top_rank(pairs)
    with staging.new_file(place) as stage:
        _write(stage, naming, {names[n]: padded(p, rank) for n, p in pairs.items()}, rank, bound)
        nbytes = stage.stat().st_size
    return GgufAdapter(
        path=place,
        architecture=naming.architecture.name,
        targets=len(pairs),
        rank=rank,
        error=relative_error(pairs.values()),
        nbytes=nbytes,
    )


def _names(delta: Delta, naming: Naming) -> dict[str, str]:
    """Return llama.cpp's name of every target; one that has none is refused before any work."""
    if delta.extras:
        first = next(iter(delta.extras))
        raise ExportError(
            f"a GGUF adapter holds no whole tensors, and the file stores {first}",
            fix="kilodelta compress --extras none, or merge and convert the model",
        )
    stacks = [name for name, parts in delta.tensors.items() if parts[0].part is not None]
    if stacks:
        raise ExportError(
            f"{stacks[0]} stacks the matrices of several experts, for which no GGUF adapter is"
            " written",
            fix="leave it out: kilodelta compress --exclude, or merge and convert the model",
        )
    transposed = [name for name, target in delta.targets.items() if target.transposed]
    if transposed:
        raise ExportError(
            f"{transposed[0]} is stored as (in, out), which no known architecture does",
            fix="merge and convert the model",
        )
    return {name: naming.name(name) for name in delta.targets}


def _write(
    path: Path, naming: Naming, pairs: dict[str, FactorPair], rank: int, delta: Delta
) -> None:
    gguf: Any = require("gguf", extra="gguf", why="write GGUF files")
    writer = gguf.GGUFWriter(path, naming.architecture.name)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    writer.add_string("kilodelta.base", delta.manifest.base.root)
    writer.add_string("kilodelta.result", delta.manifest.result)
    for name, pair in sorted(pairs.items()):
        writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(_floats(pair.A)))
        B = naming.ordered(name, _floats(pair.B))
        writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(B))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _floats(bits: Any) -> Any:
    """View a pair's matrices as numpy floats: they are held as the bits of their type."""
    return bits.view({2: np.float16, 4: np.float32}[bits.itemsize])
