"""From another tool's floats to the exact integer family: by fit, or by distillation.

The adapter is merged into its base, and `compress` takes that model as the tuned one: without
inputs it fits a LoRA by truncated SVD, with inputs it distils any method.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import kilodelta
from kilodelta.compress.adapters.conversion import Imported, convert_adapter
from kilodelta.compress.adapters.reader import ReadOptions
from kilodelta.compress.distill.compress import compress
from kilodelta.compress.distill.options import Options as CompressOptions
from kilodelta.compress.distill.options import options_from
from kilodelta.compress.distill.place import check_place
from kilodelta.files import staging
from kilodelta.format.file import load
from kilodelta.progress import Progress, silent

FIT_RANK = 8
"""Rank of a fit where nobody says another one."""


def settings(
    *,
    bits: int,
    method: str | None,
    rank: int | None,
    bases: int | None,
    steps: int | None,
    model: str | None,
    inputs: str | Path | None,
) -> CompressOptions:
    """Return how an adapter's update is compressed: without inputs a LoRA is fitted.

    Args:
        bits: of a coefficient.
        method: its name; by default `lora` without inputs, else what the budget buys.
        rank: of the method.
        bases: of the method, where it has them.
        steps: of distillation.
        model: `package.module:function` that builds the module, for bare checkpoints.
        inputs: unlabelled inputs to distil on.

    Raises:
        InputError: the method has no such option.
    """
    if inputs is None and method is None:
        method, rank = "lora", rank or FIT_RANK
    others: dict[str, Any] = {k: v for k, v in (("steps", steps), ("model", model)) if v}
    return options_from(
        budget=None, method=method, rank=rank, bases=bases, bits=str(bits), lr=None, **others
    )


def requantise(
    adapter: str | Path,
    base: str | Path,
    out: str | Path,
    *,
    options: ReadOptions,
    how: CompressOptions,
    inputs: str | Path | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Imported:
    """Import an adapter into an exact method; its `report` says what was lost.

    Args:
        adapter: as for `convert_adapter`.
        base: the model that it was trained on.
        out: the file to write.
        options: how the adapter is read.
        how: how its update is compressed; its targets and extras are the adapter's.
        inputs: unlabelled inputs to distil on.
        force: replace a file that is there.
        progress: called as the work goes on.

    Raises:
        KiloDeltaError: as `convert_adapter` and `compress` do; nothing is written then.
    """
    inputs_of = {"the adapter": Path(adapter), "the base": Path(base)}
    check_place(Path(out), inputs_of, force=force)
    with staging.scratch(beside=Path(out)) as folder:
        # fine, so that `bits` are spent once, on the fit, and its error is of the adapter itself
        fine = replace(options, bits=16)
        first = convert_adapter(adapter, base, folder / "first.kd", options=fine, progress=progress)
        tuned = folder / ("tuned" if Path(base).is_dir() else "tuned.safetensors")
        # the package's own public function: its room lies beside this one, not below it
        kilodelta.merge(base, folder / "first.kd", tuned, progress=progress)
        chosen = replace(
            how,
            name=options.name or Path(base).name,
            targets=load(folder / "first.kd").manifest.patterns.include,
            extras=",".join(first.extras) or "auto",
        )
        report = compress(base, tuned, out, inputs=inputs, options=chosen, progress=progress)
    return replace(
        first,
        path=Path(out),
        method=report.method,
        targets=report.targets,
        extras=tuple(report.extras),
        error=report.weight_error,
        nbytes=report.nbytes,
        result=report.result,
        notes=(),
        report=report,
    )
