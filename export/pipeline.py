"""A base and a delta in, a folder of proved artefacts out: ONNX files, TensorRT engines, manifest.

The merged model lies in a temporary folder only, and the output takes its name when all is there.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kilodelta import __version__
from kilodelta.errors import InputError, require
from kilodelta.export.manifest import artefacts
from kilodelta.export.manifest.artefacts import Artefact, DeltaFacts, ExportManifest, file_fact
from kilodelta.export.merge.checkpoint import merge
from kilodelta.export.merge.tensor import changed_names
from kilodelta.export.merged_model import open_merged
from kilodelta.export.options import SHORT as SHORT
from kilodelta.export.options import Options as Options
from kilodelta.export.options import short
from kilodelta.export.out_folder import out_folder, require_out
from kilodelta.export.precision import Maker
from kilodelta.export.tensorrt.flavour import AUTO, choose
from kilodelta.files import staging
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.delta import Delta
from kilodelta.format.file import load
from kilodelta.models import locate, read_inputs
from kilodelta.progress import Progress, silent
from kilodelta.rehearsal import begin_work
from kilodelta.report import write_report
from kilodelta.report.pages import require_page

log = logging.getLogger(__name__)

_LIBRARIES = ("torch", "transformers", "onnxscript", "onnx-ir", "numpy", "safetensors")


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export wrote, and how long each part took, in seconds."""

    path: Path
    manifest: ExportManifest
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
    report: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
) -> Exported:
    """Merge, prove and export a fine-tune.

    Args:
        base: the model the delta was made for: a folder, a `.safetensors` file or a hub id.
        delta: the `.kd` file.
        out: a new folder.
        options: what to export, and how.
        report: an HTML file for what was written; JSON is written beside it.
        progress: called as work goes on.

    Raises:
        BaseMismatchError, ProofError: as `merge`.
        ExportError: the model cannot be exported, or an engine not be built.
        InputError: an option that does not make sense.
        MissingPackageError: torch, onnxscript, transformers or TensorRT is needed.
        OutputError: `out` holds something, or cannot be written. It is never left half done.
    """
    chosen, place = options or Options(), Path(out)
    if report is not None:
        require_page(Path(report))
    require("onnxscript", extra="onnx", why="export ONNX models")
    trt = _trt(chosen)
    checkpoint = Checkpoint.open(locate(os.fspath(base)))
    bound = load(delta, base=checkpoint, max_work=chosen.max_work)
    require_out(place, force=chosen.force)
    files = ", ".join((*(short(d) for d in dict.fromkeys(chosen.dtypes)), *chosen.capabilities))
    begin_work(place, targets=f"{len(bound.targets)} tensors, by {bound.method.name}", files=files)
    log.info("export %s over %s: %s", delta, base, files)
    with (
        out_folder(place, force=chosen.force) as stage,
        staging.scratch(beside=place) as work,
    ):
        maker = Maker(
            options=chosen,
            trt=trt,
            refit=frozenset(changed_names(bound)) if chosen.refittable else frozenset(),
            stage=stage,
            work=work,
            progress=progress,
        )
        made = _run(checkpoint, bound, maker)
        manifest = _manifest(bound, Path(delta), chosen, made)
        artefacts.write(manifest, stage)
    gone = (
        () if chosen.onnx else tuple(f"model.{short(d)}.onnx" for d in dict.fromkeys(chosen.dtypes))
    )
    if report is not None:
        write_report(report, "export", artefacts.to_json(manifest))
    return Exported(path=place, manifest=manifest, seconds=maker.seconds, not_kept=gone)


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


def _run(base: Checkpoint, delta: Delta, maker: Maker) -> list[Artefact]:
    """Merge into the maker's working folder, open the result, and make what is asked for."""
    options = maker.options
    merged = maker.work / ("merged" if base.path.is_dir() else "merged.safetensors")
    with maker.timed("merge"):
        merge(base, delta, merged, progress=maker.progress)
    loaded = open_merged(base, merged, delta, model=options.model, config=options.config)
    loaded = loaded.choosing(options.outputs)
    batch = read_inputs(options.inputs, loaded, limit=2)[0] if options.inputs else None
    return [
        artefact
        for dtype in dict.fromkeys(options.dtypes)
        for artefact in maker.make(loaded, batch, merged, dtype)
    ]


def _manifest(delta: Delta, path: Path, options: Options, made: list[Artefact]) -> ExportManifest:
    stated = delta.manifest
    return ExportManifest(
        tool=f"kilodelta {__version__}",
        libraries=MappingProxyType(_versions()),
        base_name=stated.base.name,
        base_root=stated.base.root,
        delta=DeltaFacts(
            file=file_fact(path), method=MappingProxyType(stated.method.to_manifest())
        ),
        result_root=stated.result,
        extras=tuple(delta.extras),
        model=options.model,
        artefacts=tuple(made),
    )


def _versions() -> dict[str, str]:
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
