"""`kilodelta release`: a `.kd` file made ready for a fleet, with a version and a probe in it.

Both are covered by the file's digest. The probe holds golden inputs of the task, what the merged
model gives on them in float64, and how far each precision may be off.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kilodelta.device.make.pedigree import pedigree as bill_of
from kilodelta.device.make.pedigree import pedigree_path
from kilodelta.device.make.signing import sign_release, signing_from
from kilodelta.device.update.admit import HIGHEST
from kilodelta.errors import InputError, OutputError, require
from kilodelta.files import staging
from kilodelta.files.baseline import require_base
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.tensor import RawTensor
from kilodelta.format.delta import Delta
from kilodelta.format.file import load
from kilodelta.merging.quantised import open_base, refuse_quantised, require_grid_base
from kilodelta.models.hub import locate, locate_delta
from kilodelta.progress import Progress, silent
from kilodelta.rehearsal import begin_work
from kilodelta.trust.statement import MAX_VERSION

log = logging.getLogger(__name__)

ROWS = 2
"""Rows of a probe where nobody says how many."""


@dataclass(frozen=True, kw_only=True)
class Released:
    """What was written.

    Attributes:
        path: the file.
        nbytes: its bytes.
        version: its version.
        dtypes: the precisions in which its probe tells the fine-tune from the base; none without
            a probe.
        signatures: the files that hold its signatures.
        pedigree: the bill of materials that names its base, or None.
    """

    path: Path
    nbytes: int
    version: int
    dtypes: tuple[str, ...]
    signatures: tuple[Path, ...] = ()
    pedigree: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            **vars(self),
            "path": str(self.path),
            "dtypes": list(self.dtypes),
            "signatures": [str(path) for path in self.signatures],
            "pedigree": None if self.pedigree is None else str(self.pedigree),
        }


def release(
    base: str | os.PathLike[str],
    file: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    version: int,
    inputs: str | None = None,
    rows: int = ROWS,
    model: str | None = None,
    config: str | None = None,
    outputs: Sequence[str] = (),
    engine: Sequence[str | os.PathLike[str]] = (),
    sign: Sequence[str | os.PathLike[str]] = (),
    task: str = "",
    kinds: Sequence[str] = (),
    not_before: str = "",
    not_after: str = "",
    model_signing: str | os.PathLike[str] | None = None,
    password: bytes | None = None,
    pedigree: bool = False,
    progress: Progress = silent,
) -> Released:
    """Write a `.kd` file with a version, a probe where inputs are given, and signatures by keys.

    Args:
        base: the model the file was made for.
        file: the `.kd` file.
        out: a new `.kd` file.
        version: a whole number; a device refuses a lower one than the highest it has had.
        inputs: inputs of the task; the first `rows` become the probe.
        rows: rows of the probe.
        model: `package.module:function` that builds the module, for a probe of a base without a
            configuration.
        config: folder with the tuned model's `config.json`, for a probe where the base does not
            say the architecture.
        outputs: names or globs of the outputs that the probe holds, as the bundle was given them;
            by default all that the model declares.
        engine: device folders whose engines are patched (`bundle --mode patch --engine`): the
            fine-tune's engine is built once for each, and the file states its digest.
        sign: Ed25519 private keys; the signatures lie in `out` with `.sig` behind it.
        task: what the fine-tune is for; a device that pins another task refuses it.
        kinds: the kinds of device it is for; all by default.
        not_before: a date or UTC time from which it is valid; now by default.
        not_after: until when; for ever by default.
        model_signing: a P-256 private key, for a second signature (`.sigstore.json`) that the
            `model_signing` package verifies.
        password: of encrypted keys.
        pedigree: write a CycloneDX bill of materials beside `out` (`.cdx.json`) that names the base
            as the file's ancestor.
        progress: called while the base is read and merged.

    Raises:
        BaseMismatchError: `base` is another model.
        InputError: the inputs do not tell the fine-tune from its base, or a version out of range.
        ExportError: an engine cannot be patched to what a build of the fine-tune gives.
        OutputError: `out` exists or cannot be written.
        MissingPackageError: a probe needs torch.

    Example:
        >>> release("base/", "task.kd", "task-7.kd", version=7).dtypes  # doctest: +SKIP
        ()
    """
    place = Path(out)
    if not 0 <= version <= HIGHEST:
        raise InputError(
            f"version {version} is out of range", fix=f"count from 1 on, up to {HIGHEST}"
        )
    signing = signing_from(
        sign,
        task=task,
        kinds=kinds,
        not_before=not_before,
        not_after=not_after,
        model_signing=model_signing,
        password=password,
    )
    if signing is not None and not 1 <= version <= MAX_VERSION:
        raise InputError(
            f"version {version} cannot be signed", fix=f"count from 1 on, up to {MAX_VERSION}"
        )
    if rows < 1:
        raise InputError(f"a probe of {rows} rows probes nothing", fix="give --rows 1 or more")
    if inputs is None and rows != ROWS:
        raise InputError(
            f"--rows {rows} counts rows of a probe, and there are no inputs for one",
            fix="give --inputs, or leave --rows out",
        )
    if os.path.lexists(place):
        raise OutputError(f"{place} exists already", fix="give a new name, or remove this file")
    delta = load(locate_delta(file))
    base = locate(os.fspath(base))  # its tokenizer is signed, and no hub name has one
    begin_work(place, version=version, probe=inputs or "none", signed=signing is not None)
    log.info("release %s as version %d", file, version)
    probes: Mapping[str, RawTensor] = {}
    dtypes: tuple[str, ...] = ()
    if delta.manifest.grid is None:
        refuse_quantised(base, delta.manifest)
    if inputs is None:
        _require_base(base, delta, progress)
    else:
        require("torch", extra="hf", why="compute golden outputs")
        from kilodelta.device.make.probes import ProbeJob

        job = ProbeJob(base, delta, inputs, rows, (model, config, tuple(outputs)), place, progress)
        probes, dtypes = job.run()
    made = {**delta.manifest.made, "version": version}
    if engine:
        require("torch", extra="onnx", why="export models")
        from kilodelta.device.make.engines import built_digests

        checkpoint = Checkpoint.open(base)
        made |= built_digests(
            engine,
            checkpoint,
            delta,
            model=model,
            config=config,
            outputs=outputs,
            progress=progress,
        )
    fresh = replace(delta, manifest=replace(delta.manifest, made=made), probes=dict(probes))
    signatures = () if signing is None else signing.paths(place)
    bill = pedigree_path(place) if pedigree else None
    beside = (*signatures, bill) if bill else signatures
    # The file takes its name last: one that was to be signed never stands there unsigned.
    with staging.new_files(*beside, place) as stage:
        fine_tune = stage / place.name
        nbytes = fresh.save(fine_tune)
        if bill:
            data = bill_of(fine_tune, fresh.manifest, version, signing.task if signing else "")
            staging.write(stage / bill.name, data)
        if signing is not None:
            sign_release(fine_tune, fresh, version, base, signing)
    return Released(
        path=place,
        nbytes=nbytes,
        version=version,
        dtypes=dtypes,
        signatures=signatures,
        pedigree=bill,
    )


def _require_base(base: Path, delta: Delta, progress: Progress) -> None:
    if delta.manifest.grid is None:
        require_base(Checkpoint.open(base), delta.manifest.base, progress=progress)
        return
    model = open_base(base, delta.manifest)
    require_grid_base(model, delta.manifest, progress=progress)
