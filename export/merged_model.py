"""Open a merged model in the architecture of the fine-tune, its own tensors included."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kilodelta.errors import ExportError, InputError
from kilodelta.export.architecture import FIX, architecture
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.delta import Delta
from kilodelta.models import LoadedModel, open_model


def open_merged(
    base: Checkpoint,
    merged: Path,
    delta: Delta,
    *,
    model: str | None = None,
    config: str | None = None,
) -> LoadedModel:
    """Open a merge result.

    Args:
        base: what the delta was made for.
        merged: the merged weights, a file or a folder.
        delta: what was merged; by default its manifest says how the base's configuration changes.
        model: `package.module:function` that builds the module.
        config: the tuned model's folder, its `config.json`, or a `.kd` file made of it.

    Raises:
        InputError: nothing says what the architecture is, or two things do.
        ExportError: the architecture has no place for a tensor that the delta brings.
    """
    if model and config:
        raise InputError("--model and --config both name an architecture", fix="give one of them")
    if model:
        loaded = open_model(model, weights=merged)
    else:
        folder = base.shards[0].path.parent
        with architecture(folder, config, delta) as place:
            loaded = replace(open_model(place, weights=merged), source=str(config or folder))
    homeless = [name for name in delta.extras if name in loaded.unused]
    if homeless:
        raise ExportError(
            f"{type(loaded.module).__name__}, the architecture of {loaded.source}, has no place "
            f"for {', '.join(homeless)}, which the delta brings",
            fix=FIX,
        )
    return loaded
