"""The front of the import: an adapter and its base in, a proved `.kd` file out."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kilodelta import __version__
from kilodelta.compress.adapters.official_nola import convert
from kilodelta.compress.adapters.official_nola.checkpoint import is_official_nola
from kilodelta.compress.adapters.options import Options
from kilodelta.compress.adapters.parsed import Draft
from kilodelta.compress.adapters.peft.folder import CONFIG, Adapter, open_adapter, read_config
from kilodelta.errors import InputError
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.delta import Delta
from kilodelta.format.inspect import inspect
from kilodelta.merging.build import build
from kilodelta.progress import Progress, silent

DEFAULTS = Options()
Reader = Callable[[Adapter, Options], Draft]

PEFT: Mapping[str, str] = {
    "LORA": "peft.lora",
    "RANDLORA": "peft.randlora",
    "UNILORA": "peft.unilora",
    "VERA": "peft.vera",
}
"""`peft_type` to the module of this package whose `read` takes it."""


@dataclass(frozen=True, kw_only=True)
class Brought:
    """An import's result; `error` is ||delta - adapter's update|| / ||adapter's update||."""

    path: Path
    source: str
    method: Mapping[str, Any]
    targets: int
    extras: tuple[str, ...]
    error: float
    adapter_bytes: int
    nbytes: Mapping[str, int]
    result: str
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "path": str(self.path)}


def bring(
    adapter: str | Path,
    base: str | Path | Checkpoint,
    out: str | Path,
    *,
    options: Options = DEFAULTS,
    progress: Progress = silent,
) -> Brought:
    """Turn another tool's adapter into a `.kd` file.

    Args:
        adapter: a folder of HF PEFT, or a file of the official NOLA code.
        base: the model it was trained on.
        out: the `.kd` file to write.
        options: how its numbers are stored.
        progress: told about every stage.

    Raises:
        CheckpointError: the adapter's or the base's files are missing or damaged.
        BaseMismatchError: the adapter was not made for this base.
        InputError: a `peft_type` that is not known, a rank or shape that does not fit; nothing is
            written.
    """
    checkpoint = Checkpoint.open(base if isinstance(base, Checkpoint) else Path(base))
    draft = read(Path(adapter), checkpoint, options)
    delta = make(draft, checkpoint, progress)
    error = measured_error(draft, delta)
    delta.save(out)
    return Brought(
        path=Path(out),
        source=draft.source,
        method=delta.manifest.method.to_manifest(),
        targets=len(delta.targets),
        extras=tuple(delta.extras),
        error=error,
        adapter_bytes=size_of(Path(adapter)),
        nbytes=inspect(out).nbytes,
        result=delta.manifest.result,
        notes=draft.notes,
    )


def read(path: Path, base: Checkpoint, options: Options) -> Draft:
    """Read an adapter by what it is.

    Raises:
        InputError: it is of no kind that can be imported.
    """
    if is_official_nola(path):
        return convert.read(path, base, options)
    kind = str(read_config(path).get("peft_type"))
    if kind not in PEFT:
        raise InputError(
            f"{path / CONFIG}: peft_type {kind!r:.40} is not known here",
            fix=f"known are {', '.join(PEFT)}; merge others with PEFT and run kilodelta compress",
        )
    reader: Reader = importlib.import_module(f"kilodelta.compress.adapters.{PEFT[kind]}").read
    return reader(open_adapter(path, base), options)


def make(draft: Draft, base: Checkpoint, progress: Progress) -> Delta:
    """The draft as a proved delta."""
    made = {"tool": f"kilodelta {__version__}", "source": draft.source, **draft.recipe.made}
    name = draft.recipe.name or base.path.name
    recipe = replace(draft.recipe, name=name, made=made)
    return build(base, recipe, draft.own, draft.shared, progress=progress)


def measured_error(draft: Draft, delta: Delta) -> float:
    """What the import lost, over all targets together: 0 nothing, 1 all."""
    missed = whole = 0.0
    for name in delta.targets:
        wanted = np.asarray(draft.wanted(name), np.float64)
        missed += float(np.square(delta.update(name) - wanted).sum())
        whole += float(np.square(wanted).sum())
    return float((missed / whole) ** 0.5) if whole else float(missed > 0)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(place.stat().st_size for place in files)
