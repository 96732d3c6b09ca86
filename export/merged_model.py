"""Merge into a private place, and open the merged model in the architecture of the fine-tune."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from kilodelta.errors import ExportError, InputError
from kilodelta.export.architecture import FIX, architecture
from kilodelta.export.merge.checkpoint import merge
from kilodelta.export.merge.tensor import changed_names, merged_tensor
from kilodelta.files import staging
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.tensor import RawTensor
from kilodelta.format.delta import Delta
from kilodelta.grid.dequantise import float_folder
from kilodelta.grid.model import QuantisedModel
from kilodelta.merging.in_grid import MIN_CHANGED
from kilodelta.models import LoadedModel, open_model
from kilodelta.progress import Progress, silent


@contextmanager
def merged_weights(
    base: Checkpoint | Path,
    delta: Delta,
    *,
    beside: Path | None = None,
    min_changed: float = MIN_CHANGED,
    progress: Progress = silent,
) -> Iterator[Path]:
    """Merge into a private place that vanishes with the block, and yield its path.

    Args:
        base: the model that the delta was made for; the path of a GGUF file.
        delta: the fine-tune.
        beside: a path in the folder to use, such as the output's; the system's folder of
            temporary files by default, which may be too small for a model.
        min_changed: the share of a quantised base's codes that has to change.
        progress: called while the weights are merged.

    Raises:
        BaseMismatchError, ProofError, OutputError: as `kilodelta.merge`.
    """
    with staging.scratch(beside) as folder:
        if isinstance(base, Checkpoint):
            place = folder / ("merged" if base.path.is_dir() else "merged.safetensors")
        else:
            place = folder / f"merged{base.suffix}"
        merge(base, delta, place, min_changed=min_changed, progress=progress)
        yield place


@contextmanager
def beside_weights(
    base: QuantisedModel, delta: Delta, *, beside: Path | None = None
) -> Iterator[Path]:
    """Yield a folder of floats: a quantised base's exact values with the exact updates added.

    Each sum is rounded to float32 once. Targets that are not quantised are merged as ever.

    Args:
        base: a quantised folder.
        delta: bound to it.
        beside: a path in the folder to use, as for `merged_weights`.

    Raises:
        CheckpointError: the base cannot be read.
        InputError: it is a single file.
    """
    changed = {
        name: merged_tensor(delta, name, lambda plain: base.plain_raw(plain).data)
        for name in changed_names(delta)
        if name not in base.stored
    }
    for name in delta.grid_targets:
        c, e = delta.scale(name)
        update = np.ldexp((c * delta.expand(name)).astype(np.float64), e)
        values = base.matrix(name).values() + update
        changed[name] = RawTensor.of(values.astype(np.float32))
    with float_folder(base, beside=beside, changed=changed) as place:
        yield place


def open_merged(
    base: Checkpoint,
    weights: Path,
    delta: Delta,
    *,
    model: str | None = None,
    config: str | None = None,
    outputs: Sequence[str] = (),
    source: Path | None = None,
) -> LoadedModel:
    """Open a merge result in memory; its files are not needed any more afterwards.

    Args:
        base: what the delta was made for.
        weights: the merged weights, a file or a folder.
        delta: what was merged; by default its manifest says how the base's configuration changes.
        model: `package.module:function` that builds the module.
        config: the tuned model's folder, its `config.json`, or a `.kd` file made of it.
        outputs: names or globs of the outputs that count; all by default.
        source: the folder that messages name and processors come from, where `base` is a
            temporary copy of it; `config`, or the base's by default.

    Raises:
        InputError: nothing says what the architecture is, or two things do.
        ExportError: the architecture has no place for a tensor that the delta brings.
    """
    if model and config:
        raise InputError("--model and --config both name an architecture", fix="give one of them")
    if model:
        loaded = open_model(model, weights=weights)
    else:
        with architecture(base.folder, config, delta) as place:
            loaded = open_model(place, weights=weights)
            loaded = replace(loaded, source=str(config or source or base.folder))
    homeless = [name for name in delta.extras if name in loaded.unused]
    if homeless:
        raise ExportError(
            f"{type(loaded.module).__name__}, the architecture of {loaded.source}, has no place "
            f"for {', '.join(homeless)}, which the delta brings",
            fix=FIX,
        )
    return loaded.choosing(outputs)
