"""Compress a fine-tuned model into a file of kilobytes over its base, and say what was kept.

`compress` is a line through the rooms beside it: `options` and `place` refuse what cannot work,
`job` settles what changed and what carries it, `learn` distils, and here the delta is built,
merged in memory, measured and written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from kilodelta import __version__
from kilodelta.compress.distill import foreign, svd
from kilodelta.compress.distill.job import Job, as_dtype, prepare
from kilodelta.compress.distill.learn import state as states
from kilodelta.compress.distill.learn.data import Data, Plan, check_count, gather
from kilodelta.compress.distill.learn.loop import Distilled, Schedule, distill
from kilodelta.compress.distill.learn.measure import measure
from kilodelta.compress.distill.learn.objective import Measures
from kilodelta.compress.distill.learn.outputs import Wanted
from kilodelta.compress.distill.merged import fill_merged
from kilodelta.compress.distill.options import Options, check
from kilodelta.compress.distill.place import check_place
from kilodelta.compress.distill.report import Matched, Report
from kilodelta.compress.training import train
from kilodelta.compress.training.conversion import quantised
from kilodelta.errors import InputError, OutputError, QualityError
from kilodelta.files.model_digest import digest
from kilodelta.format.delta import Delta
from kilodelta.format.inspect import inspect
from kilodelta.format.methods import Lora
from kilodelta.merging.build import Recipe, build
from kilodelta.models import locate, open_source, read_texts
from kilodelta.models.sources import Source
from kilodelta.models.weights import fill
from kilodelta.progress import Progress, silent
from kilodelta.report import write_report
from kilodelta.report.pages import require_page

DEFAULTS = Options()


def compress(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    inputs: str | Path | None = None,
    options: Options = DEFAULTS,
    force: bool = False,
    resume: bool = False,
    report: str | Path | None = None,
    progress: Progress = silent,
) -> Report:
    """Distil a fine-tuned model into a `.kd` file over its base.

    Args:
        base: the model that the fine-tune began from: a folder, a file, or a hub id.
        tuned: the fine-tuned model, likewise; a head that the base lacks travels whole.
        out: the `.kd` file to write.
        inputs: unlabelled inputs (`kilodelta.models.read_inputs`); without them only a LoRA by
            truncated SVD is possible.
        options: how to compress.
        force: replace `out`, and forget an interrupted run towards it.
        resume: go on with an interrupted run of the same arguments.
        report: an HTML file for what was kept, its curve and the update of each layer; JSON is
            written beside it.
        progress: told about every stage.

    Returns:
        What was kept and what it cost. `interrupted` says that Ctrl-C stopped the training: the
        file then holds the best state so far, and `resume` goes on.

    Raises:
        OutputError: `out` cannot be written, exists, or belongs to a model that is read.
        BaseMismatchError: the two models do not belong together.
        CheckpointError: a model's files are missing, damaged or of another kind.
        InputError: inputs or options make no sense.
        QualityError: the agreement stayed below `options.min_agreement`; the file is written.

    Example:
        >>> from kilodelta.compress import Options, compress
        >>> compress("base/", "tuned/", "task.kd", inputs="texts.jsonl",
        ...          options=Options(budget=12_000)).after.agreement  # doctest: +SKIP
        0.983
    """
    if report is not None:
        require_page(Path(report))
    options = replace(options, **_as_given(options))
    check(options, learns=inputs is not None)
    models = {"the base": locate(base), "the tuned model": locate(tuned)}
    foreign.refuse_foreign(models["the base"], "BASE")
    foreign.refuse_foreign(models["the tuned model"], "TUNED")
    _check_outputs(Path(out), models, force=force, resume=resume, learns=inputs is not None)
    source, labels = _open_inputs(inputs, options)
    learns = source is not None
    job = prepare(models["the base"], models["the tuned model"], Path(out), options, learns=learns)
    made = _fit(job, progress) if source is None else _distil(job, source, labels, resume, progress)
    if report is not None:
        write_report(report, "compress", made.to_json())
    _check_quality(made, options)
    return made


def _as_given(options: Options) -> dict[str, Any]:
    """One glob may stand where several may."""
    fields = {"targets": options.targets, "exclude": options.exclude}
    return {k: (v,) if isinstance(v, str) else tuple(v) for k, v in fields.items()}


def _check_outputs(
    out: Path, models: Mapping[str, Path], *, force: bool, resume: bool, learns: bool
) -> None:
    check_place(out, models, force=force, resume=resume)
    kept = states.place_of(out)
    if resume and not learns:
        raise InputError("only a run with inputs can be resumed", fix="give its --inputs")
    if kept.exists() and not resume and not force:
        raise OutputError(
            f"{kept} holds an interrupted run",
            fix="go on with it by --resume, or begin anew by --force",
        )


def _open_inputs(
    inputs: str | Path | None, options: Options
) -> tuple[Source | None, tuple[str, ...] | None]:
    """The inputs and the labels, read and judged before any model is opened."""
    if inputs is None:
        return None, None
    source = open_source(inputs, field=options.field, limit=options.limit)
    if source.rows is not None:
        check_count(source.rows, source.spec, options.held_out, options.batch)
    return source, tuple(read_texts(options.labels)) if options.labels is not None else None


def _fit(job: Job, progress: Progress) -> Report:
    """Without inputs: LoRA by truncated SVD, its error measured."""
    method = svd.refuse_without_inputs(job.method, job.targets)
    own = svd.fit(job.pair.base, job.pair.tuned, job.targets, method, job.bits, progress)
    recipe = Recipe(
        method=method,
        patterns=job.patterns,
        seed=job.options.seed,
        bits=job.bits,
        name=job.name,
        extras={change.name: job.stored(change.name) for change in job.split.extras},
        config=job.config,
    )
    delta = build(job.pair.base, recipe, own, progress=progress)
    return _finish(job, delta, None, None, None, None)


def _distil(
    job: Job,
    source: Source,
    labels: tuple[str, ...] | None,
    resume: bool,
    progress: Progress,
) -> Report:
    pair, options = job.pair, job.options
    assert pair.student is not None  # `prepare` opens both where there are inputs
    assert pair.teacher is not None
    student = pair.student.choosing(tuple(options.outputs))
    plan = Plan(
        held_out=options.held_out,
        batch=options.batch,
        max_length=options.max_length,
        seed=options.seed,
        labels=labels,
        wanted=Wanted(weights=options.outputs, classes=options.classes),
        coefficients=job.coefficients,
    )
    data = gather(source, student, pair.teacher.choosing(tuple(options.outputs)), plan, progress)
    before = measure(student, data, data.held_out)
    _attach(job)
    schedule = Schedule(
        steps=options.steps,
        rate=job.method.rate if options.rate is None else options.rate,
        batch=options.batch,
        bits=job.bits,
        seed=options.seed,
    )
    kept = states.place_of(job.out)
    facts = _facts(job, data, schedule, labels)
    done = distill(student, data, schedule, progress, kept=kept, facts=facts, resume=resume)
    delta = _build(job, progress)
    train.detach(student.module)
    fill_merged(student.module, delta, pair.base, pair.names)
    after = measure(student, data, data.held_out)
    report = _finish(job, delta, done, data, before, after)
    if not done.interrupted:
        kept.unlink(missing_ok=True)
    return report


def _attach(job: Job) -> None:
    """Hook the delta into the student, which then holds the extras' tuned values."""
    pair = job.pair
    assert pair.student is not None  # the caller has looked
    module = pair.student.module
    present = {c.name: pair.names[c.name] for c in job.split.extras if c.name in pair.names}
    train.attach(
        module,
        job.method,
        job.patterns.include,
        seed=job.options.seed,
        extras=tuple(map(literal, present)),
        names=pair.names,
    )
    fill(module, pair.tuned, present)
    if isinstance(job.method, Lora):
        svd.start_from_svd(train.attached(module), pair.base, pair.tuned)


def literal(name: str) -> str:
    """Return a glob that matches just this name.

    Example:
        >>> literal("a[0].weight")
        'a[[]0].weight'
    """
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _build(job: Job, progress: Progress) -> Delta:
    """The trained delta, its extras in the types that files keep them in."""
    assert job.pair.student is not None  # the caller has looked
    module = job.pair.student.module
    attachment = train.attached(module)
    precision = attachment.precision or attachment.precision_for(job.bits)
    own, shared = quantised(attachment, precision)
    trained = attachment.frozen.trained(module)
    extras = {}
    for change in job.split.extras:
        stored = job.stored(change.name)
        if change.name in trained:
            stored = as_dtype(trained[change.name], stored.dtype)
        extras[change.name] = stored
    recipe = Recipe(
        method=precision.method,
        patterns=attachment.patterns,
        seed=attachment.seed,
        bits=precision.bits,
        name=job.name,
        extras=extras,
        config=job.config,
    )
    return build(job.pair.base, recipe, own, shared, progress=progress)


def _facts(
    job: Job, data: Data, schedule: Schedule, labels: tuple[str, ...] | None
) -> dict[str, str]:
    """What makes two runs the same, in words, for a run that is to be resumed."""
    held_out = json.dumps([list(data.held_out), list(data.learned)])
    outputs = [[o.name, o.kind, o.weight, o.axis] for o in data.survey.matched]
    return {
        "base model": digest(job.pair.base).root,
        "tuned model": digest(job.pair.tuned).root,
        "inputs (--inputs, --limit, --max-length, --field)": data.rows.digest(),
        "held-out inputs (--held-out, --seed)": _short_digest(held_out),
        "--labels": _short_digest("\n".join(labels or ())),
        "--model": job.options.model or "",
        "method": json.dumps(job.method.to_manifest(), sort_keys=True),
        "targets": json.dumps(asdict(job.patterns), sort_keys=True),
        "--extras": json.dumps([change.name for change in job.split.extras]),
        "outputs": json.dumps(outputs),
        **{f"--{key}": str(value) for key, value in asdict(schedule).items()},
    }


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _finish(
    job: Job,
    delta: Delta,
    done: Distilled | None,
    data: Data | None,
    before: tuple[Measures, ...] | None,
    after: tuple[Measures, ...] | None,
) -> Report:
    """Write the file with what was measured, and report it."""
    error, layers = svd.compare_weights(delta, job.pair.base, job.pair.tuned, job.changes)
    made: dict[str, str | int | float | bool] = {
        "tool": f"kilodelta {__version__}",
        "weight_error": round(error, 4),
    }
    overall: tuple[Measures, Measures] | None = None
    if data is not None and done is not None and before is not None and after is not None:
        overall = data.objective.overall(before), data.objective.overall(after)
        made |= _measured(data, done, *overall)
    delta = replace(delta, manifest=replace(delta.manifest, made=made))
    delta.save(job.out)
    return Report(
        path=job.out,
        method=delta.method.to_manifest(),
        bits=delta.manifest.bits,
        nbytes=inspect(job.out).nbytes,
        tuned_bytes=sum(e.nbytes for s in job.pair.tuned.shards for e in s.layout.entries),
        outputs=_matched(data, before or (), after or ()),
        ignored={} if data is None else data.survey.ignored,
        kind="" if data is None else data.objective.counts,
        held_out=0 if data is None else len(data.held_out),
        before=None if overall is None else overall[0],
        after=None if overall is None else overall[1],
        curve=() if done is None else done.curve,
        weight_error=error,
        layers=layers,
        targets=len(job.targets),
        extras=delta.manifest.extras,
        new=tuple(change.name for change in job.split.extras if change.is_new),
        dropped=job.split.dropped,
        dropped_energy=job.dropped_share,
        config=delta.manifest.config,
        steps=0 if done is None else done.steps,
        seconds=0.0 if done is None else done.seconds,
        interrupted=done is not None and done.interrupted,
        result=delta.manifest.result,
        warnings=(*job.warnings, *_warnings(data, done, overall)),
    )


def _measured(
    data: Data, done: Distilled, before: Measures, after: Measures
) -> dict[str, str | int | float | bool]:
    """What the manifest says about the agreement, each figure by the name of what it is."""
    counts = data.objective.counts
    divergence = "kl" if counts in ("top-1", "yes-no") else "distance"
    return {
        "agreement": round(after.agreement, 4),
        "agreement_counts": counts,
        "base_agreement": round(before.agreement, 4),
        divergence: round(after.divergence, 5),
        "held_out": len(data.held_out),
        "inputs": data.rows.digest()[:12],
        "steps": done.steps,
        **({"interrupted": True} if done.interrupted else {}),
    }


def _matched(
    data: Data | None, before: tuple[Measures, ...], after: tuple[Measures, ...]
) -> tuple[Matched, ...]:
    if data is None:
        return ()
    objective = data.objective
    return tuple(
        Matched(
            name=output.name,
            kind=output.kind,
            counts=comparison.counts,
            axis=output.axis,
            size=output.size,
            weight=output.weight,
            before=was,
            after=now,
        )
        for output, comparison, was, now in zip(
            objective.outputs, objective.comparisons, before, after, strict=True
        )
    )


def _warnings(
    data: Data | None, done: Distilled | None, overall: tuple[Measures, Measures] | None
) -> list[str]:
    found = []
    if overall is not None:
        before, after = overall
        if after.divergence > before.divergence or after.agreement < before.agreement:
            found.append(
                "the file is worse than none: with it the base agrees with the tuned model by"
                f" {after.agreement:.4f} (divergence {after.divergence:.4f}), without it by"
                f" {before.agreement:.4f} ({before.divergence:.4f}); give a larger --budget, more"
                " --steps or inputs, or a lower --lr"
            )
    if done is not None and done.interrupted:
        found.append(f"interrupted after {done.steps} steps: --resume goes on")
    if data is not None:
        found += [f"output {name} {why}: not matched" for name, why in data.survey.ignored.items()]
        if data.repeated:
            found.append(
                f"{data.repeated} inputs equal one that is held out and were not learnt from"
            )
        if data.survey.one_row:
            found.append("the model computes one row at a time, so a step takes longer")
    return found


def _check_quality(report: Report, options: Options) -> None:
    if options.min_agreement is None or report.after is None or report.interrupted:
        return
    if report.after.agreement < options.min_agreement:
        raise QualityError(
            f"agreement with the tuned model is {report.after.agreement:.4f} ({report.kind}), "
            f"below {options.min_agreement}; {report.path} is written all the same",
            fix="raise --budget or --steps, or give more inputs",
        )
