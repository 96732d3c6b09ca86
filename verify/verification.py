"""Everything that can be proved about a fine-tune: its digests, and what its artefacts compute.

Digests need neither torch nor a runtime; outputs are compared only where inputs are given.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kilodelta.errors import InputError, KiloDeltaError, OutputError, require
from kilodelta.export.manifest.artefacts import Manifest
from kilodelta.files import staging
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.progress import Progress, silent
from kilodelta.verify.digests.exported import check_export, is_export
from kilodelta.verify.digests.proof import Proof, prove
from kilodelta.verify.options import Options as Options
from kilodelta.verify.options import Subject
from kilodelta.verify.parity.report import Report
from kilodelta.verify.parity.result import Json
from kilodelta.verify.runners.names import check_names


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was proved by digests, and what running the artefacts showed."""

    proof: Proof
    export: Manifest | None
    """What the export folder holds; None where none was given."""

    report: Report | None
    """None where nothing was run."""

    @property
    def failure(self) -> KiloDeltaError | None:
        """The error to end with; digests that are wrong have raised it already."""
        return None if self.report is None else self.report.failure()

    def to_json(self) -> Json:
        """Plain JSON values."""
        files = [] if self.export is None else [a.files for a in self.export.artefacts]
        found: Json = asdict(self.proof)
        found["files"] = [asdict(file) for group in files for file in group]
        if self.report is None:
            return {**found, "passed": True}
        failure = self.failure
        wrong = {} if failure is None else {"error": failure.what, "fix": failure.fix}
        return {**found, **self.report.to_json(), **wrong}

    def save(self, path: Path) -> None:
        """Write the JSON."""
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
        staging.write(path, text.encode("utf-8") + b"\n")


def verify(
    base: str | os.PathLike[str],
    delta: str | os.PathLike[str],
    places: Sequence[str | os.PathLike[str]] = (),
    *,
    options: Options | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> Verification:
    """Prove base and delta, and a merged model and an export folder if they are given.

    Outputs that are wrong do not raise: see `Verification.failure`.

    Raises:
        BaseMismatchError: the base is another model.
        FileError: the delta or the export's manifest is damaged.
        ProofError: a digest is wrong.
        InputError: options or places that make no sense.
        MissingPackageError: comparing outputs needs torch.
        OutputError: the report cannot be written.
    """
    chosen = options or Options()
    merged, out = _sorted_out(places)
    _check(chosen, out)
    source = _located(base) if chosen.inputs else Path(base)
    checkpoint = Checkpoint.open(source)
    proof = prove(checkpoint, delta, merged, threads=threads, progress=progress)
    export = None if out is None else check_export(out, Path(delta), proof, progress=progress)
    report = None
    if chosen.inputs is not None:
        from kilodelta.verify.parity.outputs import compare_outputs

        subject = Subject(
            base=checkpoint, delta=Path(delta), merged=merged, folder=out, export=export
        )
        report = compare_outputs(subject, chosen, progress)
    found = Verification(proof=proof, export=export, report=report)
    if chosen.report is not None:
        found.save(Path(chosen.report))
    return found


def _sorted_out(places: Sequence[str | os.PathLike[str]]) -> tuple[Path | None, Path | None]:
    """The merged model and the export folder among the places."""
    paths = [Path(place) for place in places]
    exports = [path for path in paths if is_export(path)]
    merged = [path for path in paths if path not in exports]
    for several in (merged, exports):
        if len(several) > 1:
            raise InputError(
                f"{several[0]} and {several[1]} are two of a kind",
                fix="give one merged model and one export folder at most",
            )
    return next(iter(merged), None), next(iter(exports), None)


def _check(options: Options, out: Path | None) -> None:
    check_names(options.require)
    if options.report is not None and not Path(options.report).absolute().parent.is_dir():
        raise OutputError(f"{options.report} lies in no folder", fix="make the folder first")
    if options.inputs is not None:
        require("torch", extra="hf", why="compare what models put out")
        from kilodelta.models import check_spec

        check_spec(options.inputs)
        return
    if options.require or options.against or options.labels:
        raise InputError(
            "outputs are compared on inputs, and there are none", fix="give --inputs texts.jsonl"
        )
    if out is not None and not options.digests_only:
        raise InputError(
            f"{out} holds models to run, and there are no inputs: noise would prove little",
            fix="give --inputs with texts or images of the task, or --digests-only",
        )


def _located(base: str | os.PathLike[str]) -> Path:
    from kilodelta.models import locate

    return locate(os.fspath(base))
