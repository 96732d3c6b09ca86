"""Plan a compression: what it takes, and where asked for, the curve of size against fidelity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kilodelta.compress.distill.compress import baselines_of, for_base, plan_of, schedule_of
from kilodelta.compress.distill.job import prepare
from kilodelta.compress.distill.job.choice import require_budget
from kilodelta.compress.distill.options import Options, check
from kilodelta.compress.distill.placement import own_settings
from kilodelta.compress.distill.planning.curve import (
    Curve,
    check_folder,
    draw_curve,
    parse_budgets,
    run_of,
)
from kilodelta.compress.distill.planning.disk import FIX, needs_of_curve
from kilodelta.compress.distill.planning.estimate import Estimate, estimate_job
from kilodelta.compress.distill.planning.same_run import curve_facts, require_same_run
from kilodelta.compress.distill.precisions.grids import Grids
from kilodelta.compress.distill.precisions.opened import float_copy
from kilodelta.compress.distill.processes.launch import require_alone
from kilodelta.compress.distill.processes.ranks import Ranks
from kilodelta.compress.distill.processes.settle import check_together
from kilodelta.compress.distill.request import as_given, check_cache, find_models, open_inputs
from kilodelta.errors import InputError, require
from kilodelta.files import staging
from kilodelta.progress import Progress, silent

DEFAULTS = Options()


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What a plan says, and the curve where one was drawn.

    Attributes:
        estimate: what one budget takes: the largest of the curve, or the options' own.
        budgets: the curve's budgets in bytes; empty without one.
        total_seconds: of all budgets, the tuned model's outputs computed once.
        curve: what came out; None without one.
    """

    estimate: Estimate
    budgets: tuple[int, ...]
    total_seconds: float
    curve: Curve | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        curve = None if self.curve is None else self.curve.to_json()
        return {
            "estimate": self.estimate.to_json(),
            "budgets": list(self.budgets),
            "total_seconds": self.total_seconds,
            "curve": curve,
            "sizes": [] if curve is None else curve["sizes"],
        }


def plan(
    base: str | Path,
    tuned: str | Path,
    *,
    inputs: str | Path,
    out: str | Path = "curve",
    curve: str | Sequence[int] | None = None,
    options: Options = DEFAULTS,
    processes: int = 1,
    force: bool = False,
    resume: bool = False,
    announce: Callable[[Planned], object] | None = None,
    progress: Progress = silent,
) -> Planned:
    """Estimate memory, time and disk of a compression; with `curve`, compress at each budget.

    Args:
        base: the model that the fine-tune began from.
        tuned: the fine-tuned model.
        inputs: unlabelled inputs, as for `compress`.
        out: the curve's folder: one file per budget, `curve.json`, `curve.svg`, `teacher/`.
        curve: budgets in bytes, or as a user types them: `4KB,12KB,50KB`.
        options: how to compress; a curve has its own budgets.
        processes: estimate for each of so many that torchrun would start; `options.shard` says
            whether each holds a part of the base.
        force: begin a curve anew.
        resume: go on with a curve that was interrupted.
        announce: called with the plan before the first budget is begun.
        progress: told about every stage.

    Raises:
        InputError: inputs or options make no sense, memory does not hold a step of the curve, the
            curve to go on with is of another run, or torchrun has started several processes.
        OutputError: the folder holds a curve, or cannot be written.
        KiloDeltaError: as `compress`.

    Example:
        >>> plan("base/", "tuned/", inputs="texts.jsonl").estimate.fits  # doctest: +SKIP
        True
    """
    options = as_given(options)
    require_alone("a plan", "run it without torchrun, and give --processes N")
    if curve is not None and processes > 1:
        raise InputError(
            f"a curve is drawn by one process, not by {processes}",
            fix="leave --curve away; compress each budget under torchrun with one --teacher-cache",
        )
    sizes = _sizes(curve, options)
    if sizes:
        check_folder(Path(out), sizes, force=force, resume=resume)
        require("matplotlib", extra="report", why="draw the curve")
        options = replace(options, budget=sizes[-1], baselines=baselines_of(options, drawn=True))
    check(options, learns=True)
    if not 1 <= processes <= options.batch:
        raise InputError(
            f"{processes} processes share batches of {options.batch} inputs",
            fix=f"give --processes from 1 to {options.batch}, or a larger --batch",
        )
    source, labels = open_inputs(inputs, options)
    assert source is not None  # inputs are given
    models = find_models(base, tuned)
    check_cache(options, models)
    place, given = Path(out) / "plan.kd", models["the base"]
    planned_ranks = Ranks(rank=0, count=processes)
    check_together(options, given, planned_ranks, fix="give --processes N, or leave --shard out")
    with own_settings(options.threads), float_copy(given, Path(out)) as (floats, stored):
        job = prepare(
            floats,
            models["the tuned model"],
            place,
            for_base(options, stored, given, learns=True),
            learns=True,
            quantised=stored,
        )
        Grids(job).check()
        facts = curve_facts(job, inputs, options) if sizes else {}
        if sizes:  # the smallest is the first to be made, after the estimate of the largest
            require_budget(job, sizes[0])
            if resume and (kept := run_of(Path(out))) is not None:
                require_same_run(Path(out), facts, kept)
        estimate = estimate_job(
            job, source, plan_of(job, labels), schedule_of(job), progress, processes
        )
        needs = needs_of_curve(Path(out), job, sizes, estimate.teacher_bytes)
    each = estimate.total_seconds - estimate.teacher_seconds
    each *= 2 if sizes and "lora" in (options.baselines or ()) else 1
    planned = Planned(
        estimate=estimate,
        budgets=sizes,
        total_seconds=estimate.teacher_seconds + each * max(1, len(sizes)),
    )
    if announce is not None:
        announce(planned)
    if not sizes:
        return planned
    if not estimate.fits:
        raise InputError(
            "; ".join(estimate.warnings()).partition(":")[0],
            fix="give a smaller --batch or --max-length, or --gradient-checkpointing, and look at"
            " the plan without --curve",
        )
    staging.require_room(*needs, fix=FIX)
    del job, source  # the models are opened again for each budget
    drawn = draw_curve(
        base,
        tuned,
        Path(out),
        sizes,
        inputs=inputs,
        options=options,
        facts=facts,
        force=force,
        resume=resume,
        progress=progress,
    )
    return replace(planned, curve=drawn)


def _sizes(curve: str | Sequence[int] | None, options: Options) -> tuple[int, ...]:
    if curve is None:
        return ()
    if options.budget is not None or not isinstance(options.method, str | None):
        raise InputError(
            "a curve has its own budgets",
            fix="leave --budget, --rank and --bases away; --method NAME alone may stand beside it",
        )
    if isinstance(curve, str):
        return parse_budgets(curve)
    return parse_budgets(",".join(map(str, curve)))
