"""From a base and a fine-tune of it to a file of kilobytes, and a report of what was kept."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from kilodelta import __version__
from kilodelta.compress.distill import svd
from kilodelta.compress.distill.changes import energy
from kilodelta.compress.distill.data import Data, digest_of, gather
from kilodelta.compress.distill.job import Job, prepare
from kilodelta.compress.distill.loop import Distilled, Schedule, distill, measure
from kilodelta.compress.distill.objective import Measures
from kilodelta.compress.distill.options import Options as Options
from kilodelta.compress.distill.options import options_from as options_from
from kilodelta.compress.distill.report import Report
from kilodelta.compress.training import train
from kilodelta.errors import InputError, QualityError
from kilodelta.files.checkpoint import in_name_order
from kilodelta.files.model_digest import digest
from kilodelta.format.delta import Delta
from kilodelta.format.inspect import inspect
from kilodelta.format.methods import Lora
from kilodelta.models import check_spec, locate
from kilodelta.models.weights import fill
from kilodelta.progress import Progress, silent

DEFAULTS = Options()


def compress(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    inputs: str | Path | None = None,
    options: Options = DEFAULTS,
    resume: bool = False,
    progress: Progress = silent,
) -> Report:
    """Distil a fine-tuned model into a `.kd` file.

    Args:
        base: the model that the fine-tune began from: a folder, or a hub id.
        tuned: the fine-tuned model, likewise; a head that the base lacks travels whole.
        out: the `.kd` file to write.
        inputs: unlabelled inputs (`kilodelta.models.read_inputs`); without them only a LoRA by
            truncated SVD is possible.
        resume: go on with an interrupted run of the same arguments.

    Raises:
        BaseMismatchError: the two models do not belong together.
        InputError: inputs or options make no sense.
        QualityError: the agreement stayed below `options.min_agreement`; the file is written.
    """
    if inputs is not None:
        check_spec(inputs)
    job = prepare(locate(base), locate(tuned), Path(out), options)
    report = _fit(job, progress) if inputs is None else _distil(job, inputs, resume, progress)
    _check_quality(report, options)
    return report


def _attach(job: Job) -> None:
    """Hook the delta into the student, which then holds the extras' tuned values."""
    module = job.student.module
    extras = {c.name: job.names.get(c.name) for c in job.split.extras}
    present = {name: state for name, state in extras.items() if state is not None}
    train.attach(
        module,
        job.method,
        job.patterns.include,
        seed=job.options.seed,
        extras=tuple(present),
        names=job.names,
    )
    fill(module, job.tuned, present)
    if isinstance(job.method, Lora):
        svd.start_from_svd(job.student, job.base, job.tuned)


def _fit(job: Job, progress: Progress) -> Report:
    """Without inputs: LoRA by truncated SVD, its error measured."""
    svd.refuse_without_inputs(job.method, {target.name: target for target in job.targets})
    began = time.monotonic()
    _attach(job)
    train.quantise(job.student.module, job.bits)
    done = Distilled(
        held_out=Measures(agreement=0.0, divergence=0.0),
        steps=0,
        seconds=time.monotonic() - began,
        interrupted=False,
    )
    return _save(job, done, None, None, progress)


def _distil(job: Job, inputs: str | Path, resume: bool, progress: Progress) -> Report:
    options = job.options
    data = gather(job, inputs, progress)
    before = measure(job.student, data, data.held_out)
    _attach(job)
    schedule = Schedule(
        steps=options.steps,
        rate=options.rate or job.method.rate,
        batch=options.batch,
        bits=job.bits,
        seed=options.seed,
    )
    kept = job.out.with_name(job.out.name + ".resume")
    key = _key(job, data, schedule)
    done = distill(job.student, data, schedule, progress, kept=kept, key=key, resume=resume)
    report = _save(job, done, data, before, progress)
    if not done.interrupted:
        kept.unlink(missing_ok=True)
    return report


def _key(job: Job, data: Data, schedule: Schedule) -> str:
    """What makes two runs the same."""
    facts = {
        "base": digest(job.base).root,
        "tuned": digest(job.tuned).root,
        "inputs": data.digest,
        "labels": digest_of(job.options.labels) if job.options.labels else "",
        "method": job.method.to_manifest(),
        "schedule": asdict(schedule),
        "patterns": asdict(job.patterns),
        "extras": [change.name for change in job.split.extras],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _save(
    job: Job,
    done: Distilled,
    data: Data | None,
    before: Measures | None,
    progress: Progress,
) -> Report:
    attachment = train.attached(job.student.module)
    error = svd.weight_error(attachment, job.base, job.tuned)
    made: dict[str, Any] = {"tool": f"kilodelta {__version__}", "weight_error": round(error, 4)}
    if data is not None:
        made |= {
            "agreement": round(done.held_out.agreement, 4),
            "kl": round(done.held_out.divergence, 5),
            "held_out": len(data.held_out),
            "inputs": data.digest,
            "steps": done.steps,
        }
    delta = train.to_delta(
        job.student.module,
        job.base,
        name=job.options.name or job.base.path.name,
        made=made,
        progress=progress,
    )
    delta = _with_new_extras(delta, job)
    delta.save(job.out)
    return _report(job, done, data, before, error, delta)


def _with_new_extras(delta: Delta, job: Job) -> Delta:
    """Tensors that the student has no place for travel whole too (a removed buffer, say)."""
    absent = [c.name for c in job.split.extras if c.name not in delta.extras]
    if not absent:
        return delta
    added = {name: job.tuned.raw(name) for name in absent}
    extras = {**delta.extras, **added}
    manifest = replace(delta.manifest, extras=in_name_order(extras))
    return replace(delta, manifest=manifest, extras=extras)


def _report(
    job: Job,
    done: Distilled,
    data: Data | None,
    before: Measures | None,
    error: float,
    delta: Delta,
) -> Report:
    whole = energy(job.changes)
    kind = data.objective.kind if data is not None else ""
    return Report(
        path=job.out,
        method=delta.method.to_manifest(),
        bits=delta.manifest.bits,
        nbytes=inspect(job.out).nbytes,
        tuned_bytes=sum(job.tuned.info(name).nbytes for name in job.tuned.names),
        output=data.objective.name if data is not None else "",
        kind="top-1" if kind == "logits" else "cosine" if kind else "",
        held_out=len(data.held_out) if data is not None else 0,
        before=before,
        after=done.held_out if data is not None else None,
        weight_error=error,
        targets=len(job.targets),
        extras=delta.manifest.extras,
        dropped=job.split.dropped,
        dropped_energy=energy(job.split.dropped) / max(whole, 1e-60),
        steps=done.steps,
        seconds=done.seconds,
        interrupted=done.interrupted,
        result=delta.manifest.result,
    )


def _check_quality(report: Report, options: Options) -> None:
    if options.min_agreement is None:
        return
    if report.after is None:
        raise InputError("agreement cannot be measured without inputs", fix="give --inputs")
    if report.after.agreement < options.min_agreement:
        raise QualityError(
            f"agreement with the tuned model is {report.after.agreement:.4f} ({report.kind}), "
            f"below {options.min_agreement}; {report.path} is written all the same",
            fix="raise --budget or --steps, or give more inputs",
        )
