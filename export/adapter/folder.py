"""Write a fine-tune as ONNX Runtime's own adapter file, beside one ONNX file of the base.

::

    out/model.onnx             the base; its low-rank factors may be fed, and are zeros otherwise
    out/adapter.json           which factors there are
    out/adapter.safetensors    values to start from of tensors that fine-tunes bring whole
    out/<name>.onnx_adapter    one fine-tune, `<name>.kd`

Torch makes the first three, once. Every further fine-tune of this base adds one file, for which
numpy, numba and ONNX Runtime are enough.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kilodelta.errors import InputError, OutputError, require
from kilodelta.exact.selftest import require_good_kernels
from kilodelta.export.adapter.file import write_adapter
from kilodelta.export.adapter.fit import fit
from kilodelta.export.adapter.layout import NAME, AdapterLayout, read_layout
from kilodelta.export.options import short
from kilodelta.files import staging
from kilodelta.files.baseline import require_base
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.delta import Delta
from kilodelta.format.file import load
from kilodelta.models.hub import locate, locate_delta
from kilodelta.progress import Progress, silent
from kilodelta.rehearsal import begin_work, is_dry_run

if TYPE_CHECKING:
    from kilodelta.export.architecture import HeadedBase

GRAPH, SUFFIX = "model.onnx", ".onnx_adapter"


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """How a new graph is made; one that the folder has stays as it is.

    Attributes:
        dtype: of the graph and the factors: float32 or float16.
        rank: the highest rank that a fine-tune may have.
        include: globs of the weights that fine-tunes may change; all layers by default.
        whole: globs of tensors of the base that fine-tunes may store whole.
        model: `package.module:function` that builds the module.
        config: the tuned model's folder, its `config.json`, or a `.kd` file made of it; by default
            what the fine-tune itself says, where it brings a head.
        inputs: a batch to trace with, where the model does not say what its inputs look like.
    """

    dtype: str = "float32"
    rank: int = 8
    include: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    model: str | None = None
    config: str | None = None
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
    delta: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: AdapterOptions | None = None,
    *,
    progress: Progress = silent,
) -> AdapterFolder:
    """Write a fine-tune as an adapter file, beside a graph of its base.

    Args:
        base: the model the fine-tune was made for; not read where `out` has its graph.
        delta: the `.kd` file, whose name the adapter gets.
        out: a new folder, or one that this function made for the same base.
        options: how a new graph is made.
        progress: called with how far the work is.

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
    delta = locate_delta(delta)
    tune, name = load(delta), delta.stem + SUFFIX
    is_new = not (place / NAME).exists()
    if is_new:
        if chosen.dtype not in ("float32", "float16"):
            raise InputError(
                f"adapter files do not come in {chosen.dtype}", fix="--dtype fp32 or --dtype fp16"
            )
        staging.require_free(place)
        if is_dry_run():
            require_base(Checkpoint.open(locate(os.fspath(base))), tune.manifest.base)
        begin_work(place, graph="new", adapter=name, rank=chosen.rank, dtype=chosen.dtype)
        with staging.new_folder(place) as stage:
            layout = _write_graph(base, tune, stage, chosen, progress)
            nbytes = write_adapter(tune, layout, stage / name, progress=progress)
    else:
        layout = read_layout(place)
        _require_dtype(place, layout, chosen.dtype)
        _require_rank(place, layout, chosen.rank)
        if (place / name).exists():
            raise OutputError(
                f"{place / name} exists already", fix="remove it, or rename the .kd file"
            )
        begin_work(place / name, graph="as it is", rank=layout.rank, dtype=layout.dtype)
        nbytes = write_adapter(tune, layout, place / name, progress=progress)
    return AdapterFolder(
        path=place,
        adapter=name,
        nbytes=nbytes,
        rank=layout.rank,
        dtype=layout.dtype,
        is_new=is_new,
    )


def _require_dtype(folder: Path, layout: AdapterLayout, dtype: str) -> None:
    if layout.dtype != dtype:
        raise InputError(
            f"the graph in {folder} is of {layout.dtype}, not of {dtype}",
            fix=f"--dtype {short(layout.dtype)}, or a new folder",
        )


def _require_rank(folder: Path, layout: AdapterLayout, rank: int) -> None:
    if rank not in (layout.rank, AdapterOptions.rank):
        raise InputError(
            f"the graph in {folder} takes ranks up to {layout.rank}, and --rank {rank} describes"
            " another one",
            fix="leave --rank out, or give a new folder",
        )


def _write_graph(
    base: str | os.PathLike[str],
    delta: Delta,
    folder: Path,
    options: AdapterOptions,
    progress: Progress,
) -> AdapterLayout:
    """Write the graph and its layout, with optional inputs; see that the delta fits before the
    weights are written."""
    require("torch", extra="onnx", why="export models")
    require("onnxscript", extra="onnx", why="export ONNX models")
    from kilodelta.export.adapter.graph import with_adapter
    from kilodelta.export.onnx.make import export_template
    from kilodelta.export.onnx.save import save
    from kilodelta.export.onnx.template import fill_template
    from kilodelta.models import read_inputs
    from kilodelta.models.layers import layer_weights, stacked_weights

    checkpoint = Checkpoint.open(locate(os.fspath(base)))
    require_base(checkpoint, delta.manifest.base, progress=progress)
    headed = _open(checkpoint, delta, options)
    batch = read_inputs(options.inputs, headed.loaded, limit=2)[0] if options.inputs else None
    template, layout = with_adapter(
        export_template(headed.loaded, batch, dtype=options.dtype),
        checkpoint,
        include=options.include,
        layers=layer_weights(headed.loaded.module, headed.loaded.names),
        stacks=stacked_weights(headed.loaded.module, headed.loaded.names),
        heads=headed.heads,
        whole=options.whole,
        name=delta.manifest.base.name,
        rank=options.rank,
        optional=True,
    )
    fit(delta, layout)
    save(fill_template(template, checkpoint), folder / GRAPH, progress=progress)
    layout.write(folder)
    return layout


def _open(checkpoint: Checkpoint, delta: Delta, options: AdapterOptions) -> HeadedBase:
    """Open the base in the architecture that is asked for, or in that of the fine-tune's head."""
    from kilodelta.export.architecture import open_headed

    has_head = any(
        name not in checkpoint or checkpoint.info(name).shape != extra.shape
        for name, extra in delta.extras.items()
    )
    return open_headed(
        checkpoint,
        config=options.config,
        delta=delta if has_head else None,
        model=options.model,
    )
