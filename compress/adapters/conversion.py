"""Read an adapter by what it is, and make a proved `.kd` file of it."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kilodelta import __version__
from kilodelta.compress.adapters.foreign_files import refuse_foreign
from kilodelta.compress.adapters.official_nola import convert
from kilodelta.compress.adapters.official_nola.checkpoint import is_official_nola
from kilodelta.compress.adapters.peft.config import read_config
from kilodelta.compress.adapters.peft.folder import open_adapter
from kilodelta.compress.adapters.peft.settings import check_settings
from kilodelta.compress.adapters.reader import ParsedAdapter, ReadOptions
from kilodelta.compress.distill.place import check_place
from kilodelta.compress.distill.report import Report
from kilodelta.errors import InputError
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.delta import Delta
from kilodelta.format.inspect import inspect
from kilodelta.merging.build import build
from kilodelta.progress import Progress, silent
from kilodelta.rehearsal import begin_work

log = logging.getLogger(__name__)

DEFAULTS = ReadOptions()

PEFT: Mapping[str, str] = {
    "LORA": "peft.lora",
    "RANDLORA": "peft.randlora",
    "UNILORA": "peft.unilora",
    "VERA": "peft.vera",
}
"""`peft_type` to the module of this package whose `read` takes it."""

_PROMPTS = frozenset(
    {"ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING"}
    | {"PREFIX_TUNING", "PROMPT_TUNING"}
)
"""`peft_type`s that add inputs and change no weight."""


@dataclass(frozen=True, kw_only=True)
class Imported:
    """An import's result.

    Attributes:
        path: the `.kd` file.
        source: what the adapter was, such as `PEFT LoRA`.
        method: the file's method and its options.
        targets: how many tensors get an update.
        extras: tensors that the file holds whole.
        error: the Frobenius norm of (delta - adapter's update) over that of the adapter's update.
        adapter_bytes: the size of the adapter's files.
        nbytes: the file's size by its parts.
        result: the root digest of the merged targets.
        notes: what a user should know, each a sentence.
        report: what `compress` measured, where the adapter was requantised.
    """

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
    report: Report | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values: those of `report` where there is one."""
        if self.report is not None:
            return self.report.to_json()
        values = asdict(self)
        del values["report"]
        return {**values, "path": str(self.path)}


def convert_adapter(
    adapter: str | Path,
    base: str | Path | Checkpoint,
    out: str | Path,
    *,
    options: ReadOptions = DEFAULTS,
    force: bool = False,
    progress: Progress = silent,
) -> Imported:
    """Turn another tool's adapter into a `.kd` file, keeping all or nearly all of its update.

    Args:
        adapter: a PEFT folder, or a checkpoint of the official NOLA code.
        base: the model that it was trained on.
        out: the file to write.
        options: how to read the adapter.
        force: replace a file that is there.
        progress: called as the base is hashed and the result proved.

    Raises:
        CheckpointError: the adapter's or the base's files are missing or damaged.
        BaseMismatchError: the adapter was not made for this base.
        InputError: what the adapter does is not clear, or no delta can hold it.
        OutputError: `out` may not be replaced, or not be written.
    """
    checkpoint = Checkpoint.open(base if isinstance(base, Checkpoint) else Path(base))
    inputs = {"the adapter": Path(adapter), "the base": checkpoint.path}
    check_place(Path(out), inputs, force=force)
    parsed = read_adapter(Path(adapter), checkpoint, options)
    begin_work(out, source=parsed.source, notes="; ".join(parsed.notes) or "none")
    log.info("import %s as %s", adapter, parsed.source)
    delta = _build(parsed, checkpoint, progress)
    error = _error(parsed, delta)
    delta.save(out)
    return Imported(
        path=Path(out),
        source=parsed.source,
        method=delta.manifest.method.to_manifest(),
        targets=len(delta.targets),
        extras=tuple(delta.extras),
        error=error,
        adapter_bytes=_size(Path(adapter)),
        nbytes=inspect(out).nbytes,
        result=delta.manifest.result,
        notes=parsed.notes,
    )


def read_adapter(path: Path, base: Checkpoint, options: ReadOptions = DEFAULTS) -> ParsedAdapter:
    """Read an adapter by what it is; every tensor of it is used, or named in an error.

    Raises:
        CheckpointError: its files are missing or damaged.
        BaseMismatchError: it was not made for this base.
        InputError: it is of no kind that can be imported, or holds what nothing explains.
    """
    refuse_foreign(path)
    if is_official_nola(path):
        return convert.read(path, base, options)
    config = read_config(path)
    kind = config.values.get("peft_type")
    if not isinstance(kind, str) or kind not in PEFT:
        raise _unknown(path, str(config.where), kind)
    check_settings(config)
    adapter = open_adapter(path, config, base, options.prefix)
    parsed: ParsedAdapter = importlib.import_module(
        f"kilodelta.compress.adapters.{PEFT[kind]}"
    ).read(adapter, options)
    adapter.tensors.require_all_used()
    moved = adapter.place.note
    return replace(parsed, notes=(*parsed.notes, moved)) if moved else parsed


def _unknown(path: Path, where: str, kind: Any) -> InputError:
    if kind is None:
        return InputError(
            f"{where} has no peft_type: {path} is no adapter of Hugging Face PEFT",
            fix="give the folder that PEFT's save_pretrained wrote; adapters of other tools (MLX,"
            " kohya, torchtune) can be converted to it by their own scripts",
        )
    if isinstance(kind, str) and kind in _PROMPTS:
        return InputError(
            f"{where}: peft_type {kind!r:.40} adds inputs to the model and changes no weight, so"
            " there is no update to import",
            fix="train a LoRA adapter instead",
        )
    return InputError(
        f"{where}: peft_type {kind!r:.40} is not known here",
        fix=f"known are {', '.join(PEFT)}; merge others with PEFT and run kilodelta compress",
    )


def _build(parsed: ParsedAdapter, base: Checkpoint, progress: Progress) -> Delta:
    """Make a proved delta."""
    made = {"tool": f"kilodelta {__version__}", "source": parsed.source, **parsed.recipe.made}
    name = parsed.recipe.name or base.path.name
    recipe = replace(parsed.recipe, name=name, made=made)
    return build(base, recipe, parsed.coefficients, parsed.shared, progress=progress)


def _error(parsed: ParsedAdapter, delta: Delta) -> float:
    """Measure what the import lost, over all targets together: 0 nothing, 1 all."""
    missed = whole = 0.0
    for name in delta.targets:
        wanted = np.asarray(parsed.update(name), np.float64)
        missed += float(np.square(delta.update(name) - wanted).sum())
        whole += float(np.square(wanted).sum())
    return float((missed / whole) ** 0.5) if whole else float(missed > 0)


def _size(path: Path) -> int:
    """Return the bytes of a file, or of all files of a folder."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(place.stat().st_size for place in files)
