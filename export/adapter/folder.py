"""`kilodelta export --adapter`: one ONNX file of the base, and ONNX Runtime's own adapter files.

::

    out/model.onnx             the base; its low-rank factors may be fed, and are zeros otherwise
    out/adapter.json           which factors there are
    out/<name>.onnx_adapter    one fine-tune, `<name>.kd`

Torch makes the first two, once. Every further fine-tune of this base adds a file of its own, for
which numpy, numba and ONNX Runtime are enough.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kilodelta.errors import InputError, OutputError, require
from kilodelta.exact.selftest import require_good_kernels
from kilodelta.export.adapter.factors import fit
from kilodelta.export.adapter.file import write_adapter
from kilodelta.export.adapter.layout import NAME, read_layout
from kilodelta.export.options import short
from kilodelta.files import staging
from kilodelta.format.delta import Delta
from kilodelta.format.file import load
from kilodelta.progress import Progress, silent

GRAPH, SUFFIX = "model.onnx", ".onnx_adapter"


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """How a new graph is made; one that the folder has stays as it is."""

    dtype: str = "float32"
    rank: int = 8
    """The highest rank that a fine-tune may have."""

    include: tuple[str, ...] = ()
    """Globs of the weights that fine-tunes may change; all layers."""

    model: str | None = None
    inputs: str | None = None


@dataclass(frozen=True, kw_only=True)
class AdapterFolder:
    """What was written: the adapter file and its bytes, and whether the graph is new."""

    path: Path
    adapter: str
    nbytes: int
    rank: int
    dtype: str
    is_new: bool

    def to_json(self) -> Mapping[str, Any]:
        return {**vars(self), "path": str(self.path)}


def export_adapter(
    base: str | os.PathLike[str],
    file: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: AdapterOptions | None = None,
    *,
    progress: Progress = silent,
) -> AdapterFolder:
    """Write a fine-tune as an adapter file, beside a graph of its base.

    Args:
        base: the model the file was made for; not read where `out` has its graph.
        file: the `.kd` file.
        out: a new folder, or one that this function made for the same base.

    Raises:
        BaseMismatchError: `base` is another model, or `out` has another's graph.
        InputError: the graph cannot take this file, or an option makes no sense.
        ExportError: the model cannot be exported.
        MissingPackageError: ONNX Runtime, or for a new graph torch or onnxscript, is needed.
        OutputError: `out` holds something else or this very adapter, or cannot be written.
    """
    place, chosen = Path(out), options or AdapterOptions()
    require("onnxruntime", extra="cpu", why="write adapter files")
    require_good_kernels()
    delta, name = load(file), Path(file).stem + SUFFIX
    is_new = not (place / NAME).exists()
    if is_new:
        if chosen.dtype not in ("float32", "float16"):
            raise InputError(
                f"adapter files do not come in {chosen.dtype}", fix="--dtype fp32 or --dtype fp16"
            )
        with staging.new_folder(place) as stage:
            _write_graph(base, delta, stage, chosen, progress)
            _add(delta, stage, name, progress)
    else:
        _require_dtype(place, chosen.dtype)
        _add(delta, place, name, progress)
    layout = read_layout(place)
    return AdapterFolder(
        path=place,
        adapter=name,
        nbytes=(place / name).stat().st_size,
        rank=layout.rank,
        dtype=layout.dtype,
        is_new=is_new,
    )


def _require_dtype(folder: Path, dtype: str) -> None:
    found = read_layout(folder).dtype
    if found != dtype:
        raise InputError(
            f"the graph in {folder} is of {found}, not of {dtype}",
            fix=f"--dtype {short(found)}, or a new folder",
        )


def _add(delta: Delta, folder: Path, name: str, progress: Progress) -> None:
    if (folder / name).exists():
        raise OutputError(
            f"{folder / name} exists already", fix="remove it, or rename the .kd file"
        )
    write_adapter(delta, read_layout(folder), folder / name, progress=progress)


def _write_graph(
    base: str | os.PathLike[str],
    delta: Delta,
    folder: Path,
    options: AdapterOptions,
    progress: Progress,
) -> None:
    """The graph and its layout, with optional factors; the delta is seen to fit before the weights
    are written."""
    require("torch", extra="onnx", why="export models")
    require("onnxscript", extra="onnx", why="export ONNX models")
    from kilodelta.export.adapter.graph import with_adapter
    from kilodelta.export.onnx.save import save
    from kilodelta.export.onnx.template import export_template, fill_template
    from kilodelta.files.baseline import require_base
    from kilodelta.files.checkpoint import Checkpoint
    from kilodelta.models import locate, open_model, read_inputs

    found = locate(os.fspath(base))
    checkpoint = Checkpoint.open(found)
    require_base(checkpoint, delta.manifest.base, progress=progress)
    loaded = open_model(options.model or found, weights=checkpoint if options.model else None)
    batch = read_inputs(options.inputs, loaded, limit=2)[0] if options.inputs else None
    template, layout = with_adapter(
        export_template(loaded, batch, dtype=options.dtype),
        checkpoint,
        include=options.include,
        name=delta.manifest.base.name,
        rank=options.rank,
        optional=True,
    )
    fit(delta, layout)
    save(fill_template(template, checkpoint), folder / GRAPH, progress=progress)
    layout.write(folder)
