"""Compress a fine-tuned model into a file of kilobytes over its base, and say what was kept.

`compress` is a line through the rooms beside it: `request` and `options` refuse what cannot work,
`job` settles what changed and what carries it, `learn` distils, and here the delta is built,
merged in memory, measured and written.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

from kilodelta.compress.distill import svd
from kilodelta.compress.distill.baselines import with_baselines
from kilodelta.compress.distill.facts import run_facts, teacher_facts
from kilodelta.compress.distill.job import Job, prepare
from kilodelta.compress.distill.learn import state as states
from kilodelta.compress.distill.learn.data import Data, Plan, gather
from kilodelta.compress.distill.learn.loop import distill
from kilodelta.compress.distill.learn.measure import measure
from kilodelta.compress.distill.learn.objective import Measures
from kilodelta.compress.distill.learn.outputs import Wanted
from kilodelta.compress.distill.learn.schedule import Schedule
from kilodelta.compress.distill.learn.suiting import suiting
from kilodelta.compress.distill.learn.tune import Tuned, tune
from kilodelta.compress.distill.learn.tune import place_of as trials_of
from kilodelta.compress.distill.merged import fill_merged
from kilodelta.compress.distill.options import Options as Options
from kilodelta.compress.distill.options import check
from kilodelta.compress.distill.options import options_from as options_from
from kilodelta.compress.distill.placement import own_settings
from kilodelta.compress.distill.planning.disk import FIX, needs_of, require_place
from kilodelta.compress.distill.planning.room import rows_that_fit
from kilodelta.compress.distill.precisions.fidelity import measure_each
from kilodelta.compress.distill.precisions.grids import Grids
from kilodelta.compress.distill.precisions.opened import float_copy, kinds_of
from kilodelta.compress.distill.precisions.ways import train_for
from kilodelta.compress.distill.precisions.wishes import IN_GRID, settled
from kilodelta.compress.distill.processes.launch import joined
from kilodelta.compress.distill.processes.ranks import Ranks, one_voice
from kilodelta.compress.distill.processes.settle import for_processes
from kilodelta.compress.distill.processes.shards import shard_pair, sharded_by_layers
from kilodelta.compress.distill.report import Report
from kilodelta.compress.distill.request import (
    as_given,
    check_cache,
    check_outputs,
    find_models,
    open_inputs,
)
from kilodelta.compress.distill.results import check_quality, finish
from kilodelta.compress.distill.student import (
    attach_student,
    build_delta,
    late_logits,
    weights_as_stored,
)
from kilodelta.compress.distill.teacher.ask import Shelf
from kilodelta.compress.distill.teacher.swap import as_tuned
from kilodelta.compress.training import train
from kilodelta.compress.training.activations import checkpointed
from kilodelta.compress.training.products.rounded import FLOAT32
from kilodelta.files import staging
from kilodelta.grid.model import QuantisedModel
from kilodelta.memory import give_back, mapped_apart
from kilodelta.merging.build import Recipe, build
from kilodelta.models import LoadedModel
from kilodelta.models.hub import name_of
from kilodelta.models.inputs.sources import Source
from kilodelta.progress import Event, Progress, silent
from kilodelta.rehearsal import begin_work
from kilodelta.report import write_report
from kilodelta.report.write import require_page

log = logging.getLogger(__name__)

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

    Processes that torchrun has started (or that are joined by `torch.distributed`) share one
    compression: all of them call this with the same arguments, and the first one writes.

    Args:
        base: the model that the fine-tune began from: a folder, a file, or `hf:org/name`. Of a
            quantised folder the delta is trained against the exact values of its codes.
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
        OutputError: `out` cannot be written, exists, or belongs to a model that is read; or
            another process of a shared run has ended.
        BaseMismatchError: the two models do not belong together.
        CheckpointError: a model's files are missing, damaged or of another kind.
        InputError: inputs or options make no sense.
        QualityError: the agreement, in any precision asked for, stayed below
            `options.min_agreement`; the file is written.

    Example:
        >>> compress("base/", "tuned/", "task.kd", inputs="texts.jsonl",
        ...          options=Options(budget=12_000)).after.agreement  # doctest: +SKIP
        0.983

        Without inputs, by truncated SVD:

        >>> import tempfile
        >>> from kilodelta.export.merge.checkpoint import merge
        >>> from kilodelta.format.methods import Lora
        >>> base, file = (f"tests/golden/0.1.0/{n}" for n in ("base.safetensors", "lora-8.kd"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tuned = merge(base, file, Path(folder, "tuned.safetensors"))
        ...     options = Options(method=Lora(rank=1), targets="tall.weight", extras="none")
        ...     made = compress(base, tuned.path, Path(folder, "task.kd"), options=options)
        >>> made.method, made.targets
        ({'name': 'lora', 'rank': 1}, 1)
    """
    if report is not None:
        require_page(Path(report))
    options = as_given(options)
    options = replace(options, name=options.name or name_of(base))
    learns = inputs is not None
    check(options, learns=learns)
    with ExitStack() as stack:
        stack.enter_context(own_settings(options.threads))
        ranks = stack.enter_context(joined())
        stack.enter_context(one_voice(ranks))
        agree = ranks.agree
        models = agree(lambda: find_models(base, tuned))
        tunes = options.tune is not None
        asked = {"force": force, "resume": resume, "learns": learns, "tunes": tunes}
        agree(lambda: check_outputs(Path(out), models, **asked))
        agree(lambda: check_cache(options, models))
        agree(lambda: require_place(Path(out), options))
        source, labels = agree(lambda: open_inputs(inputs, options))
        options = agree(lambda: for_processes(options, models["the base"], ranks, learns=learns))
        ranks = replace(ranks, in_step=learns and ranks.any(options.shard == "always"))
        floats, stored = stack.enter_context(float_copy(models["the base"], Path(out)))
        options = agree(lambda: for_base(options, stored, models["the base"], learns=learns))
        job = agree(
            lambda: prepare(
                floats,
                models["the tuned model"],
                Path(out),
                options,
                learns=learns,
                quantised=stored,
                sharded=ranks.in_step,
            )
        )
        give_back()  # what opening and comparing took
        grids = Grids(job)
        agree(grids.check)
        needs = needs_of(job, learns=learns)
        agree(lambda: staging.require_room(*needs, fix=FIX))
        _announce(job, learns=learns)
        beside = baselines_of(options, drawn=report is not None)
        progress = progress if ranks.writes else silent
        made = (
            ranks.first(lambda: _fit(job, progress))
            if source is None
            else _distil(job, grids, source, labels, resume, progress, ranks, beside)
        )
        if report is not None and ranks.writes:
            write_report(report, "compress", made.to_json())
    check_quality(made, options)
    return made


def for_base(
    options: Options, stored: QuantisedModel | None, base: Path, *, learns: bool
) -> Options:
    """Settle what a base decides of the options: its name, and what `--for` may name.

    Args:
        options: as they were given.
        stored: the quantised base; None of a float one.
        base: where it lies.
        learns: whether a training is to follow.
    """
    kinds = None if stored is None else kinds_of(stored)
    precisions = settled(options.precisions, kinds, base) if learns else ()
    # A copy of a quantised base's values lies in a folder of another name.
    name = options.name if stored is None else options.name or base.name
    return replace(options, precisions=precisions, name=name)


def _announce(job: Job, *, learns: bool) -> None:
    """Log what is trained; in a dry run, end here."""
    how = f"{job.method.name}, {job.bits} bits, {job.coefficients} coefficients"
    steps = job.options.steps if learns else 0
    extras = ", ".join(change.name for change in job.split.extras) or "none"
    targets = f"{len(job.targets)} tensors"
    begin_work(job.out, method=how, targets=targets, extras=extras, steps=steps)
    log.info("compress to %s: %s, %s, %d steps", job.out, how, targets, steps)


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
    delta = build(job.built_on, recipe, own, progress=progress)
    return finish(job, delta, None, None, None, None)


def _distil(
    job: Job,
    grids: Grids,
    source: Source,
    labels: tuple[str, ...] | None,
    resume: bool,
    progress: Progress,
    ranks: Ranks,
    baselines: Sequence[str],
) -> Report:
    options = job.options
    with ExitStack() as ending:
        if ranks.in_step:
            ending.enter_context(sharded_by_layers())
            kept = [job.pair.names[c.name] for c in job.split.extras if c.name in job.pair.names]
            job = replace(job, pair=ranks.agree(lambda: shard_pair(job.pair, ranks, kept)))
        pair = job.pair
        assert pair.student is not None  # `prepare` opens both where there are inputs
        student = pair.student.choosing(tuple(options.outputs))
        shelf = Shelf(
            cache=None if options.teacher_cache is None else Path(options.teacher_cache),
            facts=lambda: teacher_facts(job),
            scratch=lambda: ending.enter_context(staging.scratch(job.out)),
            ranks=ranks,
            beside=needs_of(job, learns=True),
        )
        data = gather(
            source, student, as_tuned(pair, job.changes), plan_of(job, labels), progress, shelf
        )
        products = suiting(student, data, pair.placement.products, options.batch)
        data = ending.enter_context(late_logits(job, student, data))
        give_back()  # the teacher's activations and logits
        if options.gradient_checkpointing:
            ending.enter_context(checkpointed(student.module))
        schedule = schedule_of(job, products)
        report = _learn(job, grids, student, data, schedule, labels, resume, progress)
        if baselines and not report.interrupted:
            report = with_baselines(report, baselines, job, student, data, schedule, progress)
        return replace(report, dtype=pair.placement.training_in(products))


def baselines_of(options: Options, *, drawn: bool) -> tuple[str, ...]:
    """Return what is measured beside a file; SVDs are where a picture is drawn."""
    if options.baselines is not None:
        return options.baselines
    return ("svd",) if drawn else ()


def plan_of(job: Job, labels: tuple[str, ...] | None) -> Plan:
    """Say how a job's inputs are used."""
    options = job.options
    return Plan(
        held_out=options.held_out,
        batch=options.batch,
        max_length=options.max_length,
        seed=options.seed,
        labels=labels,
        wanted=Wanted(weights=options.outputs, classes=options.classes),
        coefficients=job.coefficients,
        all_tokens=options.loss_on == "all",
    )


def schedule_of(job: Job, products: str = FLOAT32) -> Schedule:
    """Say how long and how fast a job trains, and in which type its steps multiply."""
    options = job.options
    return Schedule(
        steps=options.steps,
        rate=job.method.rate if options.rate is None else options.rate,
        batch=options.batch,
        bits=job.bits,
        seed=options.seed,
        products=products,
    )


def _learn(
    job: Job,
    grids: Grids,
    student: LoadedModel,
    data: Data,
    schedule: Schedule,
    labels: tuple[str, ...] | None,
    resume: bool,
    progress: Progress,
) -> Report:
    """Train the student on what the teacher has put out, and write the file."""
    pair, kept, trials = job.pair, states.place_of(job.out), trials_of(job.out)
    before = measure(student, data, data.held_out)
    attach_student(job)
    train_for(job, grids)
    give_back()  # what measuring, and decomposing every change, took
    facts = run_facts(job, data, schedule, labels)
    searched: Tuned | None = None
    with weights_as_stored(job, student, data):
        room = data.ranks.least(rows_that_fit(student, data, 2 * schedule.batch))
        give_back()
        fitting = min(room, schedule.batch)
        # The rows are counted by what is in use; holes in the heap may take as much again.
        with mapped_apart() if room < 2 * schedule.batch else nullcontext():
            if job.options.tune is not None:
                searched = tune(
                    student, data, schedule, job.options.tune, _of_trials(progress),
                    kept=trials, facts=facts, resume=resume, piece=fitting,
                )  # fmt: skip
                schedule = replace(schedule, rate=searched.rate)
                facts = run_facts(job, data, schedule, labels)
                resume = resume and kept.exists()  # the search may have been interrupted
            done = distill(
                student, data, schedule, progress,
                kept=kept, facts=facts, resume=resume, piece=fitting,
            )  # fmt: skip
    if searched is not None:
        done = replace(done, rate=searched.rate, trials=searched.trials)
    delta = build_delta(job, progress)
    train.detach(student.module)
    give_back()  # the training's activations, before merged weights take the base's place
    after: tuple[Measures, ...] | None = None
    if job.quantised is None:
        fill_merged(student.module, delta, pair.base, pair.names)
        after = measure(student, data, data.held_out)
    fidelity = measure_each(job, grids, delta, student, data)
    # Of a quantised base, what `merge` writes counts: the result in the grid, if it is asked for.
    counted = after or next((f for f in fidelity if f.name == IN_GRID), fidelity[0]).outputs
    report = data.ranks.first(lambda: finish(job, delta, done, data, before, counted, fidelity))
    if not done.interrupted and data.ranks.writes:
        kept.unlink(missing_ok=True)
        trials.unlink(missing_ok=True)
    return report


def _of_trials(progress: Progress) -> Progress:
    """Say at every stage that it is a trial of the search for a rate."""

    def tell(event: Event) -> None:
        progress(replace(event, stage=f"{event.stage} (trial)"))

    return tell
