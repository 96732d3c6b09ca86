"""Prove all that can be proved about a fine-tune: its digests, and what its artefacts compute.

Digests need neither torch nor a runtime. Outputs are compared only if inputs are given.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kilodelta.errors import InputError, KiloDeltaError, OutputError
from kilodelta.errors import require as require_package
from kilodelta.export.manifest.facts import ExportManifest
from kilodelta.files import staging
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.file import load
from kilodelta.models.hub import locate_delta
from kilodelta.progress import Progress, silent
from kilodelta.report import write_report
from kilodelta.report.write import require_page
from kilodelta.verify.digests.exported import check_export, is_export
from kilodelta.verify.digests.proof import Proof, prove
from kilodelta.verify.options import Subject, VerifyOptions
from kilodelta.verify.parity.report import Report
from kilodelta.verify.parity.result import Json
from kilodelta.verify.runners.names import check_names

_Path = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was proved by digests, and what running the artefacts showed.

    Attributes:
        proof: the proved roots.
        export: what the export folder holds; None if none was given.
        report: what was run; None if nothing was.
    """

    proof: Proof
    export: ExportManifest | None
    report: Report | None

    @property
    def failure(self) -> KiloDeltaError | None:
        """The error to end with, or None; a wrong digest has raised before."""
        return None if self.report is None else self.report.failure()

    def to_json(self) -> Json:
        """Return everything, fit for strict JSON."""
        files = [] if self.export is None else [a.files for a in self.export.artefacts]
        table: Json = asdict(self.proof)
        table["files"] = [asdict(file) for group in files for file in group]
        if self.report is None:
            return {**table, "passed": True}
        failure = self.failure
        wrong = {} if failure is None else {"error": failure.what, "fix": failure.fix}
        return {**table, **self.report.to_json(), **wrong}

    def save(self, path: Path) -> None:
        """Write the JSON; as an HTML page with the JSON beside it, where the name ends in `.html`.

        Raises:
            OutputError: it cannot be written.
            MissingPackageError: a page needs matplotlib.
        """
        if path.suffix.lower() == ".html":
            write_report(path, "verify", self.to_json())
            return
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
        staging.write(path, text.encode("utf-8") + b"\n")


def verify(
    base: _Path,
    delta: _Path,
    places: Sequence[_Path] = (),
    *,
    inputs: _Path | None = None,
    against: _Path | None = None,
    labels: _Path | None = None,
    require: Sequence[str] = (),
    device: str = "cpu",
    limit: int | None = None,
    max_length: int | None = None,
    field: str = "text",
    model: str | None = None,
    config: _Path | None = None,
    generate: int | None = None,
    digests_only: bool = False,
    max_work: float | None = None,
    report: _Path | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> Verification:
    """Prove a base and a delta, and what was made of them; the command `kilodelta verify`.

    Outputs that are wrong do not raise: see `Verification.failure`.

    Args:
        base: the model that the delta was made for: a folder, a `.safetensors` file, a quantised
            `.gguf` or `.onnx` file, or `hf:org/name`.
        delta: the `.kd` file.
        places: a merged model, an export folder, both or neither, in any order.
        inputs: real inputs to run everything on: `.jsonl`, `.txt`, `.npz`, or
            `package.module:function` that yields batches.
        against: the tuned model, to measure agreement with.
        labels: a text file, one label per line; agreement then also counts which label's embedding
            an input's embedding is nearest to.
        require: runners that have to run, such as `["ort", "tensorrt"]`.
        device: where torch computes the float64 reference, "cpu" or "cuda".
        limit: read at most so many inputs.
        max_length: cut texts to so many tokens.
        field: the key of the text in a `.jsonl` record.
        model: `package.module:function` that builds the module.
        config: a folder with the tuned model's `config.json`, if the base's does not fit.
        generate: read `inputs` as prompts, let decoders exported with a cache write so many tokens
            after each, and compare the texts and their logits with the merged model's.
        digests_only: check an export folder by its digests and run nothing.
        max_work: the most operations that the file may ask for; by default what suits the base's
            size.
        report: a file to write the JSON to, or an HTML page where its name ends in `.html`, also
            if an artefact fails.
        threads: for digests and merging; all cores by default.
        progress: called as work goes on.

    Raises:
        BaseMismatchError: the base is another model.
        FileError: the delta or the export's manifest is damaged, or the delta asks for more work
            than allowed.
        ProofError: a digest is wrong.
        InputError: options, places or inputs do not make sense.
        MissingPackageError: comparing outputs needs torch.
        OutputError: the report cannot be written.

    Example:
        >>> found = verify("tests/golden/0.1.0/base.safetensors", "tests/golden/0.1.0/nola-8.kd")
        >>> found.failure is None, found.proof.targets
        (True, 4)
    """
    options = VerifyOptions(
        inputs=_text(inputs),
        against=_text(against),
        labels=_text(labels),
        require=tuple(require),
        device=device,
        limit=limit,
        max_length=max_length,
        field=field,
        model=model,
        config=_text(config),
        generate=generate,
        digests_only=digests_only,
        max_work=max_work,
        report=_text(report),
    )
    merged, out = _sorted_out(places)
    _check(options, out)
    delta = locate_delta(delta)
    loaded = load(delta, max_work=max_work)
    located = Path(_located(base))
    # A quantised model may be one file that is no checkpoint.
    single = loaded.manifest.grid is not None and located.suffix.lower() in (".gguf", ".onnx")
    opened = located if single else Checkpoint.open(located)
    proof = prove(opened, loaded, merged, threads=threads, progress=progress)
    export = None if out is None else check_export(out, Path(delta), proof, progress=progress)
    outputs = None
    if options.inputs is not None:
        subject = Subject(base=opened, delta=Path(delta), merged=merged, folder=out, export=export)
        outputs = _compare(subject, options, progress)
    verification = Verification(proof=proof, export=export, report=outputs)
    if options.report is not None:
        verification.save(Path(options.report))
    return verification


def _compare(subject: Subject, options: VerifyOptions, progress: Progress) -> Report:
    """Compare outputs, or what decoders write."""
    from kilodelta.verify.generation.compare import compare_generation, has_cache
    from kilodelta.verify.parity.bench import compare_outputs

    if options.generate is not None:
        return compare_generation(subject, options, progress)
    decoders = [] if subject.export is None else list(filter(has_cache, subject.export.artefacts))
    if decoders:
        raise InputError(
            f"{decoders[0].file} has a cache, so it is compared by what it writes",
            fix="give --generate with a number of tokens, such as --generate 64",
        )
    return compare_outputs(subject, options, progress)


def _text(path: _Path | None) -> str | None:
    return None if path is None else os.fspath(path)


def _sorted_out(places: Sequence[_Path]) -> tuple[Path | None, Path | None]:
    """Return the merged model and the export folder among the places."""
    paths = [Path(place) for place in places]
    exports = [path for path in paths if is_export(path)]
    merged = [path for path in paths if path not in exports]
    for several, kind in ((merged, "merged model"), (exports, "export")):
        if absent := [path for path in several if not path.exists()]:
            raise InputError(f"{absent[0]} does not exist", fix="check the path, or make it first")
        if len(several) > 1:
            raise InputError(
                f"{several[0]} and {several[1]} are two of a kind: each counts as a {kind}, "
                f"{'with a' if several is exports else 'without an'} export's manifest",
                fix="give one merged model and one export folder at most",
            )
    return next(iter(merged), None), next(iter(exports), None)


def _check(options: VerifyOptions, out: Path | None) -> None:
    """Refuse what cannot work, before any work."""
    check_names(options.require)
    if options.device not in ("cpu", "cuda"):
        raise InputError(f"{options.device} is no device to compute on", fix="give cpu or cuda")
    if options.report is not None and not Path(options.report).absolute().parent.is_dir():
        raise OutputError(f"{options.report} lies in no folder", fix="make the folder first")
    if options.report is not None and Path(options.report).suffix.lower() == ".html":
        require_page(Path(options.report))
    if options.inputs is not None:
        _check_comparison(options)
        return
    if options.require or options.against or options.labels or options.generate:
        raise InputError(
            "outputs are compared on inputs, and there are none", fix="give --inputs texts.jsonl"
        )
    if out is not None and not options.digests_only:
        raise InputError(
            f"{out} holds models to run, and there are no inputs: noise would prove little",
            fix="give --inputs with texts or images of the task, or --digests-only",
        )


def _check_comparison(options: VerifyOptions) -> None:
    require_package("torch", extra="hf", why="compare what models put out")
    from kilodelta.models import check_spec, read_texts

    assert options.inputs is not None
    check_spec(options.inputs)
    if options.digests_only:
        raise InputError(
            "--inputs asks for outputs, --digests-only for none", fix="give one of both"
        )
    if options.generate is not None:
        _check_generation(options)
    if options.labels is None:
        return
    if options.against is None:
        raise InputError(
            "labels say by what two models agree, and there is one model",
            fix="give --against with the tuned model, or leave --labels away",
        )
    read_texts(options.labels)


def _check_generation(options: VerifyOptions) -> None:
    if options.generate is not None and options.generate < 1:
        raise InputError(f"{options.generate} tokens are no text", fix="give --generate 1 or more")
    if options.against or options.labels:
        raise InputError(
            "--generate compares with the merged model alone",
            fix="leave --against and --labels out",
        )


def _located(base: _Path) -> Path:
    from kilodelta.models import locate

    return locate(os.fspath(base))
