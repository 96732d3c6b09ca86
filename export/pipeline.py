"""Export a fine-tune: base and delta in, a folder of proved artefacts out.

The merged model lies in a private folder only, and the output takes its name when all of it is
there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kilodelta.errors import InputError, require
from kilodelta.export.decoder.genai import CONFIG
from kilodelta.export.manifest import artefacts
from kilodelta.export.manifest.describe import export_manifest
from kilodelta.export.manifest.facts import Artefact, ExportManifest
from kilodelta.export.merge.tensor import changed_names
from kilodelta.export.merged_model import merged_weights, open_merged
from kilodelta.export.options import Options, listed, read_dtypes, read_sizes, short
from kilodelta.export.out_folder import out_folder, require_out
from kilodelta.export.precision import Maker
from kilodelta.export.quantised.checks import check_quantised, refuse_blocks
from kilodelta.export.quantised.graph import settled
from kilodelta.export.room import needs_of_export
from kilodelta.export.tensorrt.flavour import AUTO, choose
from kilodelta.export.triton.repository import Repository, require_servable, write_repository
from kilodelta.files import staging
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.delta import Delta
from kilodelta.format.file import load
from kilodelta.grid.dequantise import float_folder
from kilodelta.grid.model import QuantisedModel
from kilodelta.grid.open import open_named
from kilodelta.merging.in_grid import MIN_CHANGED
from kilodelta.merging.quantised import open_base, refuse_quantised
from kilodelta.models import locate, read_inputs
from kilodelta.models.hub import locate_delta
from kilodelta.progress import Progress, silent
from kilodelta.rehearsal import begin_work
from kilodelta.report import write_report
from kilodelta.report.write import require_page

log = logging.getLogger(__name__)

_ROWS = 2
"""Rows of the inputs that are read: the graph is traced at sizes of its own."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export wrote.

    Attributes:
        path: the folder.
        manifest: what lies in it.
        seconds: how long each part took.
        not_kept: ONNX files that engines were built from, and that are gone.
        notes: sentences on axes that are fixed although one might expect otherwise.
        triton: what was written into a model repository, or None.
    """

    path: Path
    manifest: ExportManifest
    seconds: Mapping[str, float]
    not_kept: tuple[str, ...]
    notes: tuple[str, ...]
    triton: Repository | None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        served = self.triton
        return {
            "path": str(self.path),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "not_kept": list(self.not_kept),
            "notes": list(self.notes),
            "manifest": artefacts.to_json(self.manifest),
            "triton": None if served is None else {**asdict(served), "path": str(served.path)},
        }


def export(
    base: str | os.PathLike[str],
    delta: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    onnx: bool = False,
    tensorrt: str | Sequence[str] = (),
    dtype: str | Sequence[str] = ("fp32",),
    external_data: bool = False,
    flavour: str = AUTO,
    profile: str | Sequence[str] = (),
    tf32: bool = False,
    refittable: bool = False,
    model: str | None = None,
    config: str | None = None,
    inputs: str | None = None,
    outputs: str | Sequence[str] = (),
    kv_cache: bool = False,
    triton: str | os.PathLike[str] | None = None,
    blocks: str = "auto",
    min_changed: float = MIN_CHANGED,
    max_work: float | None = None,
    force: bool = False,
    report: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
) -> Exported:
    """Merge, prove and export a fine-tune.

    Args:
        base: the model the delta was made for: a folder, a `.safetensors` or `.gguf` file, or
            `hf:org/name`.
        delta: the `.kd` file.
        out: a new folder.
        onnx: keep the ONNX files; without `tensorrt` they are always kept.
        tensorrt: GPUs to build one engine for, such as `["sm86", "sm89"]`.
        dtype: precisions of weights and arithmetic: "fp32", "fp16", "bf16".
        external_data: put weights beside the ONNX file; above 2 GB they are there anyway.
        flavour: "tensorrt_rtx", "tensorrt", or "auto", which takes RTX where it builds for the
            GPUs asked for.
        profile: sizes of axes, such as `["batch=1,8,32"]`: smallest, usual, largest. Images vary
            in `height` and `width` only where these are named.
        tf32: let engines take float32 products in TF32.
        refittable: let the delta's tensors be exchanged in the engine later.
        model: `package.module:function` that builds the module.
        config: a folder with the tuned model's config.json.
        inputs: a batch to trace with, as `kilodelta.models.read_inputs` takes it, where the model
            does not say what its inputs look like. An encoder-decoder becomes one graph by them,
            and an encoder and a decoder without.
        outputs: names or globs of the outputs to export; by default all that the model declares.
        kv_cache: export a causal language model as one graph for prompts and single steps, its
            cache as inputs and outputs, with the files that ONNX Runtime GenAI reads beside it; of
            an encoder-decoder, which is exported as two graphs, give the decoder such a cache.
        triton: a Triton model repository that gets the artefacts as its next version as well.
        blocks: of a quantised base, the operators that hold its codes: "matmulnbits", which ONNX
            Runtime computes without unpacking a matrix, where it takes the grid; "qdq", which
            TensorRT takes alone; "auto", the one that suits.
        min_changed: of a quantised base, the share of codes that the merge has to change.
        max_work: the most operations that the file may ask for; by default what suits the base's
            size.
        force: replace an earlier export in `out`.
        report: an HTML file for what was written; JSON is written beside it.
        progress: called while work goes on.

    Raises:
        BaseMismatchError, ProofError, QualityError: as `kilodelta.merge`.
        ExportError: the model cannot be exported, an engine not be built, or Triton not serve it;
            what can be known beforehand is refused before the merge.
        InputError: an option that does not make sense.
        MissingPackageError: torch, onnxscript, transformers or TensorRT is needed.
        OutputError: `out` holds something, or cannot be written. It is never left half done.

    Example:
        >>> export("base/", "task.kd", "out/", dtype=["fp16"]).path  # doctest: +SKIP
        PosixPath('out')
    """
    options = Options(
        onnx=onnx or not tensorrt,
        capabilities=listed(tensorrt),
        dtypes=read_dtypes(listed(dtype)),
        external=external_data,
        flavour=flavour,
        sizes=read_sizes(listed(profile)),
        tf32=tf32,
        refittable=refittable,
        model=model,
        config=config,
        inputs=inputs,
        outputs=listed(outputs),
        max_work=max_work,
        kv_cache=kv_cache,
        served=triton is not None,
        blocks=blocks,
        min_changed=min_changed,
        force=force,
    )
    if kv_cache:
        _check_cached(options, triton)
    if report is not None:
        require_page(Path(report))
    settled(blocks, for_engines=bool(options.capabilities))
    require("onnxscript", extra="onnx", why="export ONNX models")
    trt = _trt(options)
    if triton is not None:
        kinds = [*(["onnx"] if options.onnx else []), *([trt.__name__] if trt is not None else [])]
        require_servable(delta, kinds=kinds, dtypes=options.dtypes)
    done = _export(Path(os.fspath(base)), Path(delta), Path(out), options, trt, progress)
    if report is not None:
        write_report(report, "export", artefacts.to_json(done.manifest))
    if triton is None:
        return done
    return replace(done, triton=write_repository(done.path, triton))


def _check_cached(options: Options, triton: object) -> None:
    """Refuse what a graph with a cache cannot be combined with, before any work."""
    for name, value in (("--inputs", options.inputs), ("--outputs", options.outputs)):
        if value:
            raise InputError(
                f"--kv-cache and {name} were both given, and a graph with a cache has inputs and "
                "outputs of its own",
                fix=f"leave one of them out; {name} is for models without a cache",
            )
    if triton is not None:
        raise InputError(
            "Triton keeps no cache between requests", fix="leave --kv-cache or --triton out"
        )
    if len(options.dtypes) > 1:
        raise InputError(
            f"{len(options.dtypes)} precisions were asked for; one {CONFIG} describes one graph",
            fix="export each precision into a folder of its own",
        )


def _trt(options: Options) -> Any:
    """TensorRT, found and asked before any work is done; None where no engine is wanted."""
    if options.capabilities:
        return choose(options.flavour, options.capabilities, options.dtypes)
    if options.tf32 or options.refittable or options.flavour != AUTO:
        raise InputError(
            "engines were described and none was asked for",
            fix="give --tensorrt with compute capabilities, such as sm86,sm89",
        )
    return None


def _export(
    base: Path, delta: Path, out: Path, options: Options, trt: Any, progress: Progress
) -> Exported:
    place, delta = locate(base), locate_delta(delta)
    tuned = load(delta, max_work=options.max_work)
    grid = None if tuned.manifest.grid is None else open_base(place, tuned.manifest)
    if grid is not None:
        check_quantised(grid, tuned, options)
        tuned = tuned.bind(grid)
    else:
        refuse_quantised(Checkpoint.open(place), tuned.manifest)
        refuse_blocks(options.blocks, base)
        tuned = tuned.bind(place)
    require_out(out, force=options.force)
    source = grid or Checkpoint.open(place)
    staging.require_room(*needs_of_export(source, tuned, out, options.dtypes))
    files = ", ".join((*map(short, options.dtypes), *options.capabilities))
    begin_work(out, targets=f"{len(tuned.targets)} tensors, by {tuned.method.name}", files=files)
    log.info("export %s over %s: %s", delta, base, files)
    with out_folder(out, force=options.force) as stage:
        maker = Maker(
            options=options,
            trt=trt,
            refit=frozenset(changed_names(tuned)) if options.refittable else frozenset(),
            stage=stage,
            progress=progress,
        )
        if grid is None:
            made = _make(Checkpoint.open(place), tuned, maker, out)
        else:
            made = _make_quantised(grid, tuned, maker, out)
        manifest = export_manifest(tuned, delta, options.model, made)
        artefacts.write(manifest, stage)
    return Exported(
        path=out,
        manifest=manifest,
        seconds=maker.seconds,
        not_kept=tuple(maker.dropped),
        notes=tuple(dict.fromkeys(maker.notes)),
        triton=None,
    )


def _make(base: Checkpoint, delta: Delta, maker: Maker, out: Path) -> list[Artefact]:
    """Merge, open the result, and make what is asked for."""
    with ExitStack() as stack:
        with maker.timed("merge"):
            weights = stack.enter_context(
                merged_weights(base, delta, beside=out, progress=maker.progress)
            )
        return _artefacts(base, weights, delta, maker)


def _make_quantised(base: QuantisedModel, delta: Delta, maker: Maker, out: Path) -> list[Artefact]:
    """Merge in the grid, open the result's values, and make what is asked for with its codes."""
    checkpoint = base.source if isinstance(base.source, Checkpoint) else None
    with ExitStack() as stack:
        with maker.timed("merge"):
            weights = stack.enter_context(
                merged_weights(
                    checkpoint or base.path,
                    delta,
                    beside=out,
                    min_changed=maker.options.min_changed,
                    progress=maker.progress,
                )
            )
            merged = open_named(weights)
            floats = stack.enter_context(float_folder(merged, beside=weights))
        # The copy's configuration is the merged one, and does not call for a quantised model.
        maker = replace(maker, merged=merged)
        # Of a GGUF file the copy alone has a tokenizer.
        source = floats if checkpoint is None else checkpoint.folder
        return _artefacts(Checkpoint.open(floats), floats, delta, maker, source=source)


def _artefacts(
    base: Checkpoint, weights: Path, delta: Delta, maker: Maker, source: Path | None = None
) -> list[Artefact]:
    """Open a merged model and make what is asked for; `source` as for `open_merged`."""
    options = maker.options
    loaded = open_merged(
        base,
        weights,
        delta,
        model=options.model,
        config=options.config,
        outputs=options.outputs,
        source=source,
    )
    batch = read_inputs(options.inputs, loaded, limit=_ROWS)[0] if options.inputs else None
    return [
        artefact
        for dtype in options.dtypes
        for artefact in maker.make(loaded, batch, weights, dtype)
    ]
