"""`kilodelta bundle`: a device folder made from a base, on a build machine with torch.

What is deployed is exported once. Every fine-tune of this base can then be applied to it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kilodelta.device.folder.bundle import Bundle
from kilodelta.device.folder.places import Places
from kilodelta.device.golden import reference
from kilodelta.device.make.seal import seal
from kilodelta.device.modes import patch, runtime
from kilodelta.device.modes import refit as mode_refit
from kilodelta.errors import InputError, require
from kilodelta.export.adapter.graph import with_adapter
from kilodelta.export.manifest.facts import Sizes
from kilodelta.export.onnx.save import save
from kilodelta.export.onnx.template import Template, export_template, fill_template
from kilodelta.export.patching.make_map import make_map, write_rest
from kilodelta.export.patching.map import write_map
from kilodelta.export.tensorrt import build
from kilodelta.export.tensorrt.flavour import AUTO, choose
from kilodelta.export.tensorrt.profile import profile_for
from kilodelta.files import staging
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.identity import digest
from kilodelta.files.safetensors import write_stream
from kilodelta.format.targets import Patterns, select
from kilodelta.models import LoadedModel, locate, open_model
from kilodelta.progress import Event, Progress, silent


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to deploy, and how."""

    mode: str
    """`adapter`, `patch` or `refit`."""

    dtype: str = "float32"
    capabilities: tuple[str, ...] = ()
    """GPUs to build an engine for, such as `("sm89",)`; ONNX Runtime runs the model without any."""

    flavour: str = AUTO
    provider: str = "cpu"
    """Where ONNX Runtime runs: `cpu` or `cuda`."""

    onnx: bool = False
    """Keep the ONNX file that an engine was built from."""

    rank: int = 8
    """Adapter mode: the highest rank that a fine-tune may have."""

    slots: int = 0
    """Adapter mode: how many fine-tunes one batch may mix; 0 for one a batch."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    """Adapter and refit mode: globs of the tensors that fine-tunes may change; all layers."""

    sizes: Mapping[str, Sizes] = field(default_factory=dict)
    model: str | None = None
    """`package.module:function` that builds the module."""

    name: str = ""
    """The base's name, for messages."""

    probe: str | None = None
    """Golden inputs: `.npz`, `.jsonl`, `.txt` or `package.module:function`."""

    keep: int = 1
    """Fine-tunes that stay on the device's disk to go back to."""


def make(
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: Options,
    *,
    progress: Progress = silent,
) -> Bundle:
    """Make a device folder that serves the base.

    Args:
        base: a folder, a `.safetensors` file (with `options.model`) or a hub id.
        out: a new folder.

    Raises:
        InputError: options that do not go together.
        ExportError: the model cannot be exported, or an engine not be built.
        MissingPackageError: torch, onnxscript, transformers or TensorRT is needed.
        OutputError: `out` holds something, or cannot be written.
    """
    require("onnxscript", extra="onnx", why="export ONNX models")
    _check(options)
    with staging.new_folder(Path(out)) as stage:
        return _Job(os.fspath(base), options, progress).run(Places(stage))


def _check(options: Options) -> None:
    if options.mode == "refit" and not options.capabilities:
        raise InputError(
            "refit mode needs an engine", fix="give --engine with its GPU's name, such as sm89"
        )
    if options.mode == "patch" and options.capabilities:
        raise InputError(
            "patch mode changes ONNX files; an engine would have to be built anew for each",
            fix="take --mode refit for the engine, or leave --engine out",
        )
    if options.mode != "adapter" and options.slots:
        raise InputError(
            f"{options.mode} mode computes a batch with one fine-tune",
            fix="take --mode adapter for --slots, or leave --slots out",
        )
    if options.keep < 1:
        raise InputError("keep 0 leaves nothing to roll back to", fix="give --keep 1 or more")


class _Job:
    """One bundle in the making."""

    def __init__(self, base: str, options: Options, progress: Progress) -> None:
        self.options, self.progress, self.name = options, progress, options.name or Path(base).name
        self.trt: Any = None
        if options.capabilities:
            self.trt = choose(options.flavour, options.capabilities, (options.dtype,))
        folder = locate(base)
        self.base = Checkpoint.open(folder)
        weights = self.base if options.model else None
        self.loaded: LoadedModel = open_model(options.model or folder, weights=weights)

    def run(self, places: Places) -> Bundle:
        """Fill a stage."""
        places.base.mkdir()
        batch = reference.golden_inputs(self.loaded, self.options.probe, reference.ROWS)
        self._tell("golden", 1)
        known = reference.exact(self.loaded, batch)
        limits = reference.limits(self.loaded, known, self.options.dtype)
        self._tell("export", 2)
        MAKERS[self.options.mode](
            self, export_template(self.loaded, batch, dtype=self.options.dtype), places.base
        )
        self._tell("sealed", 3)
        identity = digest(self.base)
        bundle = Bundle(
            mode=self.options.mode,
            dtype=self.options.dtype,
            runtime=self.trt.__name__ if self.trt else f"onnxruntime-{self.options.provider}",
            name=self.name,
            root=identity.root,
            files=(),
            limits=limits,
            keep=self.options.keep,
        )
        infos = {name: self.base.info(name) for name in self.base.names}
        return seal(places, bundle, known=known, infos=infos, identity=identity)

    def save(self, template: Template, folder: Path) -> Path:
        """The filled template as the folder's ONNX file."""
        return save(fill_template(template, self.base), folder / runtime.ONNX)[0]

    def engine(self, template: Template, folder: Path, refit: tuple[str, ...] = ()) -> None:
        """The folder's engine, built from its ONNX file, which then goes unless it is wanted."""
        onnx = folder / runtime.ONNX
        build.build(
            self.trt,
            onnx,
            folder / runtime.ENGINE,
            capabilities=self.options.capabilities,
            profile=profile_for(self.loaded, template.inputs, self.options.sizes),
            refit=refit,
            progress=self.progress,
        )
        if not self.options.onnx:
            for path in folder.glob(f"{runtime.ONNX}*"):
                path.unlink()

    def chosen(self) -> tuple[str, ...]:
        """The base's tensors that fine-tunes may change."""
        include, exclude = self.options.include or ("*",), self.options.exclude
        infos = (self.base.info(name) for name in self.base.names)
        patterns = Patterns(include=include, exclude=exclude)
        return tuple(target.name for target in select(infos, patterns))

    def _tell(self, what: str, done: int) -> None:
        self.progress(Event(stage=f"bundle: {what}", done=done, total=3, unit="steps"))


def _adapter(job: _Job, template: Template, folder: Path) -> None:
    options = job.options
    wide, layout = with_adapter(
        template,
        job.base,
        include=options.include,
        exclude=options.exclude,
        name=job.name,
        rank=options.rank,
        slots=options.slots,
    )
    job.save(wide, folder)
    layout.write(folder)
    if job.trt:
        job.engine(wide, folder)


def _patch(job: _Job, template: Template, folder: Path) -> None:
    found = make_map(job.save(template, folder), job.base, unused=template.unused)
    write_map(found, folder / patch.MAP)
    write_rest(found, job.base, folder / patch.REST)


def _refit(job: _Job, template: Template, folder: Path) -> None:
    names = [name for name in job.chosen() if name in template.weights]
    job.save(template, folder)
    job.engine(template, folder, refit=tuple(names))
    infos = [job.base.info(name) for name in job.chosen()]
    data = (job.base.data(info.name).data for info in infos)
    write_stream(folder / mode_refit.WEIGHTS, infos, data)
    mode_refit.write_unused(folder, template.unused)


MAKERS: Mapping[str, Callable[[_Job, Template, Path], None]] = MappingProxyType(
    {"adapter": _adapter, "patch": _patch, "refit": _refit}
)
