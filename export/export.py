"""A base and a delta in, a folder of proved artefacts out: ONNX files, TensorRT engines, manifest.

The merged model lies in a temporary folder only, and the output takes its name when all is there.
"""

from __future__ import annotations

import importlib.metadata
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kilodelta import __version__
from kilodelta.errors import InputError, require
from kilodelta.export import artefacts, tensorrt
from kilodelta.export.artefacts import (
    Artefact,
    DeltaFacts,
    EngineFacts,
    Manifest,
    Profile,
    file_fact,
)
from kilodelta.export.merge import merge
from kilodelta.export.onnx import Template, export_template, fill_template
from kilodelta.export.onnx_save import save
from kilodelta.export.opening import open_merged
from kilodelta.export.out_folder import out_folder
from kilodelta.export.profile import Sizes, profile_for
from kilodelta.export.tensorrt_flavour import AUTO, choose
from kilodelta.format.checkpoint import Checkpoint
from kilodelta.format.delta import Delta
from kilodelta.format.file import load
from kilodelta.format.manifest import method_options
from kilodelta.models import Batch, LoadedModel, locate, read_inputs
from kilodelta.progress import Event, Progress, silent

SHORT: Mapping[str, str] = MappingProxyType(
    {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
)
"""Precisions as file names and the command line write them."""

_LIBRARIES = ("torch", "transformers", "onnxscript", "onnx-ir", "numpy", "safetensors")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to export, and how."""

    onnx: bool = True
    """Keep the ONNX files; engines are built from them either way."""

    capabilities: tuple[str, ...] = ()
    """GPUs to build an engine for, such as `("sm86", "sm89")`; none by default."""

    dtypes: tuple[str, ...] = ("float32",)
    external: bool = False
    """Put weights beside the ONNX file; above 2 GB they are there anyway."""

    flavour: str = AUTO
    sizes: Mapping[str, Sizes] = field(default_factory=lambda: MappingProxyType({}))
    """Smallest, usual and largest size of axes, by name; the others' follow from the model."""

    tf32: bool = False
    refittable: bool = False
    """Let the delta's tensors be exchanged in the engine later."""

    model: str | None = None
    config: str | None = None
    inputs: str | None = None
    """A batch to trace with, where the model does not say what its inputs look like."""

    force: bool = False


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export wrote, and how long each part took, in seconds."""

    path: Path
    manifest: Manifest
    seconds: Mapping[str, float]
    not_kept: tuple[str, ...]
    """ONNX files that engines were built from, and that are gone."""

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "not_kept": list(self.not_kept),
            "manifest": artefacts.to_json(self.manifest),
        }


def export(
    base: str | os.PathLike[str],
    delta: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    options: Options | None = None,
    progress: Progress = silent,
) -> Exported:
    """Merge, prove and export a fine-tune.

    Args:
        base: the model the delta was made for: a folder, a `.safetensors` file or a hub id.
        delta: the `.kd` file.
        out: a new folder.

    Raises:
        BaseMismatchError, ProofError: as `merge`.
        ExportError: the model cannot be exported, or an engine not be built.
        InputError: an option that does not make sense.
        MissingPackageError: torch, onnxscript, transformers or TensorRT is needed.
        OutputError: `out` holds something, or cannot be written. It is never left half done.
    """
    chosen = options or Options()
    require("onnxscript", extra="onnx", why="export ONNX models")
    job = _Job(_trt(chosen), locate(os.fspath(base)), Path(delta), chosen, progress)
    place = Path(out)
    with (
        out_folder(place, force=chosen.force) as stage,
        tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as work,
    ):
        manifest = job.run(stage, Path(work))
        artefacts.write(manifest, stage)
    return Exported(
        path=place,
        manifest=manifest,
        seconds=MappingProxyType(job.seconds),
        not_kept=tuple(job.not_kept),
    )


def _trt(options: Options) -> Any:
    """TensorRT, found and asked before any work is done; None where no engine is wanted."""
    if options.capabilities:
        return choose(options.flavour, options.capabilities, options.dtypes)
    unused = options.tf32 or options.refittable or options.flavour != AUTO
    if unused or not options.onnx:
        raise InputError(
            "engines were described and none was asked for" if unused else "nothing to export",
            fix="give --tensorrt with compute capabilities, such as sm86,sm89",
        )
    return None


class _Job:
    """One export: what is known from the start, and what it takes note of."""

    def __init__(
        self, trt: Any, base: Path, delta: Path, options: Options, progress: Progress
    ) -> None:
        self.trt, self.options, self.progress = trt, options, progress
        self.base, self.delta_path = Checkpoint.open(base), delta
        self.delta: Delta = load(delta)
        self.seconds: dict[str, float] = {}
        self.not_kept: list[str] = []

    def run(self, stage: Path, work: Path) -> Manifest:
        """Everything but the manifest into `stage`; `work` holds what is not kept."""
        merged = work / ("merged" if self.base.path.is_dir() else "merged.safetensors")
        self._timed("merge", lambda: merge(self.base, self.delta, merged, progress=self.progress))
        options = self.options
        loaded = open_merged(
            self.base, merged, self.delta, model=options.model, config=options.config
        )
        batch = None
        if options.inputs is not None:
            batch = read_inputs(options.inputs, loaded, limit=2)[0]
        made: list[Artefact] = []
        for dtype in dict.fromkeys(options.dtypes):
            made += self._artefacts(loaded, batch, dtype, merged, stage, work)
        return self._manifest(tuple(made))

    def _artefacts(
        self,
        loaded: LoadedModel,
        batch: Batch | None,
        dtype: str,
        merged: Path,
        stage: Path,
        work: Path,
    ) -> list[Artefact]:
        """One precision's ONNX file and engine."""
        short = next(name for name, full in SHORT.items() if full == dtype)
        name = f"model.{short}.onnx"
        template = self._timed(f"trace {short}", lambda: self._trace(loaded, batch, dtype, short))
        profile = profile_for(loaded, template.inputs, self.options.sizes)
        folder = stage if self.options.onnx else work
        files = self._timed(name, lambda: self._save(template, merged, folder / name))
        onnx = _artefact("onnx", template, files, profile)
        if not self.options.onnx:
            self.not_kept += [file.name for file in files]
        kept = [onnx] if self.options.onnx else []
        return kept + self._engines(template, onnx, folder, stage / f"model.{short}.engine")

    def _trace(self, loaded: LoadedModel, batch: Batch | None, dtype: str, short: str) -> Template:
        self.progress(Event(stage=f"trace {short}", done=0, total=1, unit="models"))
        template = export_template(loaded, batch, dtype=dtype)
        self.progress(Event(stage=f"trace {short}", done=1, total=1, unit="models"))
        return template

    def _save(self, template: Template, merged: Path, path: Path) -> tuple[Path, ...]:
        external = self.options.external or None  # None: only where one file cannot hold them
        return save(
            fill_template(template, merged), path, external=external, progress=self.progress
        )

    def _engines(
        self, template: Template, onnx: Artefact, folder: Path, engine: Path
    ) -> list[Artefact]:
        if self.trt is None:
            return []
        refit = self._refit(template)
        self._timed(
            engine.name,
            lambda: tensorrt.build(
                self.trt,
                folder / onnx.file,
                engine,
                capabilities=self.options.capabilities,
                profile=onnx.profile,
                tf32=self.options.tf32,
                refit=refit,
                progress=self.progress,
            ),
        )
        facts = EngineFacts(
            flavour=self.trt.__name__,
            version=self.trt.__version__,
            capabilities=self.options.capabilities,
            tf32=self.options.tf32,
            refittable=refit,
            onnx=onnx.files[0].sha256,
        )
        return [_artefact("engine", template, (engine,), onnx.profile, facts)]

    def _refit(self, template: Template) -> tuple[str, ...]:
        """The delta's tensors that the outputs depend on."""
        if not self.options.refittable:
            return ()
        changed = {*self.delta.bind(self.base).targets, *self.delta.extras}
        return tuple(name for name in template.weights if name in changed)

    def _manifest(self, made: tuple[Artefact, ...]) -> Manifest:
        known = self.delta.manifest
        return Manifest(
            tool=f"kilodelta {__version__}",
            libraries=MappingProxyType(_versions()),
            base_name=known.base.name,
            base_root=known.base.root,
            delta=DeltaFacts(
                file=file_fact(self.delta_path),
                method=MappingProxyType(method_options(known.method)),
            ),
            result_root=known.result,
            extras=tuple(self.delta.extras),
            model=self.options.model,
            artefacts=made,
        )

    def _timed(self, part: str, work: Any) -> Any:
        began = time.perf_counter()
        result = work()
        self.seconds[part] = time.perf_counter() - began
        return result


def _artefact(
    kind: Any,
    template: Template,
    files: Sequence[Path],
    profile: Profile,
    engine: EngineFacts | None = None,
) -> Artefact:
    return Artefact(
        kind=kind,
        dtype=template.dtype,  # type: ignore[arg-type]
        files=tuple(file_fact(path) for path in files),
        inputs=template.inputs,
        outputs=template.outputs,
        profile=profile,
        engine=engine,
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
