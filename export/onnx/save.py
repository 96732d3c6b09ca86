"""Writing ONNX models: in one file, or with the weights in a second one beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kilodelta.errors import InputError
from kilodelta.files import staging
from kilodelta.progress import Event, Progress, silent

ONE_FILE = (2 << 30) - (64 << 20)
"""Bytes of weights that fit into one file: protobuf ends at 2 GiB, and the graph needs room."""

_SMALL = 1024  # bytes; shape constants stay in the graph, where runtimes look for them


def save(
    model: Any, path: Path, *, external: bool | None = None, progress: Progress = silent
) -> tuple[Path, ...]:
    """Write an `onnx_ir.Model`, in full or not at all.

    Args:
        model: such as `fill_template` gives.
        path: the `.onnx` file.
        external: put the weights into `<path>.data` beside it. By default only where one file
            cannot hold them.

    Returns:
        the files written, the model first.

    Raises:
        InputError: one file is asked for and cannot hold the weights.
        OutputError: they cannot be written.
    """
    size = weight_bytes(model)
    if external is False and size > ONE_FILE:
        raise InputError(
            f"{size} bytes of weights do not fit into one ONNX file", fix="allow external data"
        )
    staging.require_room(staging.Need(path=path, nbytes=size, what=path.name))
    beside = f"{path.name}.data" if external or size > ONE_FILE else None
    names = [path.name] if beside is None else [beside, path.name]
    with staging.new_files(*(path.parent / name for name in names)) as stage:
        _write(model, stage / path.name, beside, progress)
    return tuple(path.parent / name for name in reversed(names))


def weight_bytes(model: Any) -> int:
    """Return the bytes of all initializers."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values())


def _write(model: Any, path: Path, beside: str | None, progress: Progress) -> None:
    import onnx_ir as ir

    def report(tensor: Any, place: Any) -> None:
        progress(Event(stage="onnx", done=place.index + 1, total=place.total, unit="tensors"))

    ir.save(
        model,
        path,
        format="protobuf",
        external_data=beside,
        size_threshold_bytes=_SMALL,
        callback=report if beside else None,
    )
