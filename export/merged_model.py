"""The module that a merged model's weights belong to, the delta's own tensors included."""

from __future__ import annotations

from pathlib import Path

from kilodelta.errors import ExportError, InputError
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.delta import Delta
from kilodelta.models import LoadedModel, open_model

_FIX = (
    "give --config FOLDER, whose config.json is the tuned model's, "
    "or --model package.module:function"
)


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
        model: `package.module:function` that builds the module.
        config: a folder with the config.json of the architecture; the base's by default.

    Raises:
        InputError: nothing says what the architecture is, or two things do.
        ExportError: the architecture has no place for a tensor that the delta brings.
    """
    if model and config:
        raise InputError("--model and --config both name an architecture", fix="give one of them")
    folder = base.shards[0].path.parent
    if not (model or config or (folder / "config.json").is_file()):
        raise InputError(f"{folder} holds no config.json", fix=_FIX)
    loaded = open_model(model or config or folder, weights=merged)
    homeless = [name for name in delta.extras if name in loaded.unused]
    if homeless:
        raise ExportError(
            f"{type(loaded.module).__name__}, the architecture of {loaded.source}, has no place "
            f"for {', '.join(homeless)}, which the delta brings",
            fix=_FIX,
        )
    return loaded
