"""From another tool's floats to the exact integer family: by fit, or by distillation.

The adapter is merged into its base, and `compress` takes that model as the tuned one: without
inputs it fits a LoRA by truncated SVD, with inputs it distils any method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from kilodelta.compress.adapters.importing import bring
from kilodelta.compress.adapters.options import Options
from kilodelta.compress.distill.compress import compress
from kilodelta.compress.distill.options import Options as CompressOptions
from kilodelta.compress.distill.report import Report
from kilodelta.files import staging
from kilodelta.format.file import load
from kilodelta.progress import Progress, silent

Merge = Callable[..., Any]
"""`kilodelta.merge`: (base, delta, out)."""


def requantise(
    adapter: str | Path,
    base: str | Path,
    out: str | Path,
    *,
    merge: Merge,
    options: Options,
    how: CompressOptions,
    inputs: str | Path | None = None,
    progress: Progress = silent,
) -> Report:
    """Import an adapter into an exact method; the report says what was lost.

    Args:
        options: how the adapter is read.
        how: how its update is compressed; its targets and extras are the adapter's.
        inputs: unlabelled inputs to distil on.

    Raises:
        KiloDeltaError: as `bring` and `compress` do; nothing is written then.
    """
    with staging.scratch(beside=Path(out)) as folder:
        first = bring(adapter, base, folder / "first.kd", options=options, progress=progress)
        tuned = folder / ("tuned" if Path(base).is_dir() else "tuned.safetensors")
        merge(base, folder / "first.kd", tuned, progress=progress)
        chosen = replace(
            how,
            name=options.name or Path(base).name,
            targets=load(folder / "first.kd").manifest.patterns.include,
            extras=",".join(first.extras) or "auto",
        )
        return compress(base, tuned, out, inputs=inputs, options=chosen, progress=progress)
