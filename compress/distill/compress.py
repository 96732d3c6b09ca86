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

from kilodelta.compress.distill import foreign, svd
from kilodelta.compress.distill.job import Job, as_dtype, prepare
from kilodelta.compress.distill.learn import state as states
from kilodelta.compress.distill.learn.data import Data, Plan, check_count, gather
from kilodelta.compress.distill.learn.loop import distill
from kilodelta.compress.distill.learn.measure import measure
from kilodelta.compress.distill.learn.outputs import Wanted
from kilodelta.compress.distill.learn.schedule import Schedule
from kilodelta.compress.distill.merged import fill_merged
from kilodelta.compress.distill.options import Options as Options
from kilodelta.compress.distill.options import check
from kilodelta.compress.distill.options import options_from as options_from
from kilodelta.compress.distill.place import check_place
from kilodelta.compress.distill.report import Report
from kilodelta.compress.distill.results import check_quality, finish
from kilodelta.compress.training import train
from kilodelta.compress.training.conversion import quantised
from kilodelta.errors import InputError, OutputError
from kilodelta.files.model_digest import digest
from kilodelta.format.delta import Delta
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
    check_quality(made, options)
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
    return finish(job, delta, None, None, None, None)


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
    report = finish(job, delta, done, data, before, after)
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
