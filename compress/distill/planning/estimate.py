"""Estimate a compression before its first step: peak memory, seconds per step, disk, the total.

Nothing is guessed from sizes alone. The models are opened, the delta is attached, and three real
steps are taken on throw-away coefficients: one on the longest batch, whose kept activations are
counted, and two on a batch of usual length, which are timed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from kilodelta.compress.distill.job import Job
from kilodelta.compress.distill.learn.data import Data, Plan, objective_for, read_rows
from kilodelta.compress.distill.learn.measure import measure
from kilodelta.compress.distill.learn.outputs import run as outputs_of
from kilodelta.compress.distill.learn.schedule import Schedule
from kilodelta.compress.distill.learn.steps import EVALUATIONS, LOOKED_AT, Run
from kilodelta.compress.distill.learn.suiting import suiting
from kilodelta.compress.distill.learn.survey import survey
from kilodelta.compress.distill.placement import choose_placement, wants_shards
from kilodelta.compress.distill.planning.memory import available, counting_kept
from kilodelta.compress.distill.processes.shards import Parts, require_parts
from kilodelta.compress.distill.student import attach_student, late_logits, weights_as_stored
from kilodelta.compress.distill.teacher.ask import compute, estimate
from kilodelta.compress.distill.teacher.swap import as_tuned
from kilodelta.compress.training import train
from kilodelta.compress.training.activations import checkpointed
from kilodelta.compress.training.products.rounded import FLOAT32
from kilodelta.memory import resident
from kilodelta.models import LoadedModel
from kilodelta.models.inputs.sources import Source
from kilodelta.progress import Event, Progress
from kilodelta.sizes import byte_label

PROBES = 2
"""Timed steps."""
OPTIMISER = 4
"""Float32 numbers per coefficient: itself, its gradient, and two moments."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a compression of one budget takes.

    Attributes:
        peak_bytes: the most memory at once, the program itself included.
        available_bytes: what this process holds and could still take; None where the system does
            not say.
        weights_bytes: the model in memory.
        activations_bytes: what a step on the longest batch keeps for its backward pass.
        teacher_bytes: the tuned model's outputs.
        teacher_on_disk: whether they lie on disk.
        shortened: by output, how many classes of a distribution are kept; absent where all are.
        step_seconds: of a training step on a batch of usual length.
        teacher_seconds: of computing the tuned model's outputs.
        steps: how many are planned.
        total_seconds: of teacher, steps and looks at the held-out inputs together.
        rows: inputs in all.
        coefficients: numbers that are trained.
        processes: among how many the work is shared out; memory is then that of one of them, and
            what they exchange takes time beside.
        sharded: whether each of them holds a part of the base.
        dtype: what `--dtype` is, or what its `auto` becomes.
    """

    peak_bytes: int
    available_bytes: int | None
    weights_bytes: int
    activations_bytes: int
    teacher_bytes: int
    teacher_on_disk: bool
    shortened: dict[str, int]
    step_seconds: float
    teacher_seconds: float
    steps: int
    total_seconds: float
    rows: int
    coefficients: int
    processes: int = 1
    sharded: bool = False
    dtype: str = ""

    @property
    def fits(self) -> bool:
        """Whether memory holds it, as far as the system says what there is."""
        return self.available_bytes is None or self.peak_bytes <= self.available_bytes

    def warnings(self) -> list[str]:
        """Say what a user should hear of before the first step."""
        if self.fits:
            return []
        assert self.available_bytes is not None  # otherwise it fits
        return [
            f"a step may take {byte_label(self.peak_bytes)} at its peak"
            + ("" if self.processes == 1 else f" in each of {self.processes} processes")
            + f", and {byte_label(self.available_bytes)} are free: give a smaller --batch or"
            " --max-length, or --gradient-checkpointing"
            + (", or more --processes" if self.sharded else "")
        ]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "fits": self.fits, "warnings": self.warnings()}


def estimate_job(
    job: Job,
    source: Source,
    plan: Plan,
    schedule: Schedule,
    progress: Progress,
    processes: int = 1,
) -> Estimate:
    """Measure a few steps of a job, and say what all of it takes.

    Args:
        job: what was settled; its student is left as it was.
        source: the inputs.
        plan: how they are used.
        schedule: how long and how fast.
        progress: told about the probes.
        processes: among how many it is to be shared out.

    Raises:
        InputError: inputs or outputs do not fit the models, or the model cannot be sharded.
    """
    pair = job.pair
    assert pair.student is not None  # the caller has inputs, so the models were opened to compute
    student = pair.student.choosing(tuple(plan.wanted.weights))
    parts = _parts(job, processes)
    with as_tuned(pair, job.changes) as model:
        model = model.choosing(tuple(plan.wanted.weights))
        rows = read_rows(source, model, plan)
        seen = survey(model, rows, plan.wanted)
        rows = rows if seen.padded else rows.unpadded()
        need = estimate(model, rows, seen)
        matched = tuple(replace(o, kept=need.shortened.get(o.name, 0)) for o in seen.matched)
        seen = replace(seen, matched=matched)
        order = sorted(range(len(rows)), key=rows.length)
        usual, longest = _middle(order, plan.batch), order[-plan.batch :]
        chosen = list(dict.fromkeys([*usual, *longest]))
        began = time.monotonic()
        teacher = compute(model, rows.subset(chosen), seen, progress)
        teacher_seconds = (time.monotonic() - began) * len(rows) / len(chosen)
    places = {index: place for place, index in enumerate(chosen)}
    data = Data(
        rows=rows.subset(chosen),
        teacher=teacher,
        objective=objective_for(seen.matched, teacher, range(len(chosen)), None, plan),
        survey=seen,
        learned=range(len(chosen)),
        held_out=[places[i] for i in usual],
        repeated=0,
    )
    # A sharded weight is whole only while its layer computes.
    products = FLOAT32
    if parts is None:
        products = suiting(student, data, pair.placement.products, schedule.batch)
    schedule = replace(schedule, products=products)
    with ExitStack() as stack:
        data = stack.enter_context(late_logits(job, student, data))
        if job.options.gradient_checkpointing:
            stack.enter_context(checkpointed(student.module))
        attach_student(job)
        try:
            whole = resident()  # before weights are mapped in place of their copies
            with weights_as_stored(job, student, data) if parts is None else nullcontext():
                held, kept, step, look = _probe(
                    student, data, schedule, usual, longest, places, progress
                )
        finally:
            train.detach(student.module)
    held_out = plan.held_out or min(512, max(1, len(rows) // 10))
    looked_at = 2 * held_out + EVALUATIONS * min(held_out, LOOKED_AT)
    teacher_seconds, step, look = (s / processes for s in (teacher_seconds, step, look))
    total = teacher_seconds + schedule.steps * step + look * looked_at / len(usual)
    total += 60 * (job.options.tune or 0.0)  # at most, but for a first trial that takes longer
    coefficients = job.coefficients
    teacher_memory = need.whole if need.is_small else 0
    device = next(student.module.parameters()).device
    free = available(device)
    weights = sum(p.nbytes for p in student.module.parameters())
    each = weights if parts is None else parts.per_process(processes)
    kept_by_each = -(-kept.nbytes // processes)
    peak = held - weights + each + kept_by_each + 2 * -(-kept.largest // processes)
    peak = max(peak + 4 * OPTIMISER * coefficients, whole - weights + each) + teacher_memory
    return Estimate(
        peak_bytes=peak,
        available_bytes=None if free is None else resident() + free,
        weights_bytes=each,
        activations_bytes=kept_by_each,
        teacher_bytes=need.kept,
        teacher_on_disk=not need.is_small,
        shortened=dict(need.shortened),
        step_seconds=step,
        teacher_seconds=teacher_seconds,
        steps=schedule.steps,
        total_seconds=total,
        rows=len(rows),
        coefficients=coefficients,
        processes=processes,
        sharded=parts is not None,
        dtype=pair.placement.training_in(products),
    )


def _parts(job: Job, processes: int) -> Parts | None:
    """Judge how the base is divided among processes; None where each holds all of it.

    Raises:
        InputError: it is to be sharded, and its model repeats no blocks.
    """
    pair, shard = job.pair, job.options.shard
    assert pair.student is not None  # the caller has looked
    if shard == "auto" and processes > 1:
        placement = choose_placement(job.options.device, job.options.dtype, pair.base)
        shard = "always" if wants_shards(pair.base, placement) else "never"
    if processes == 1 or shard == "never":
        return None
    kept = [pair.names[c.name] for c in job.split.extras if c.name in pair.names]
    return require_parts(pair.student.module, kept)


def _middle(order: Sequence[int], count: int) -> list[int]:
    """Return `count` rows of usual length, of rows in the order of their lengths."""
    start = max(0, (len(order) - count) // 2)
    return list(order[start : start + count])


def _probe(
    student: LoadedModel,
    data: Data,
    schedule: Schedule,
    usual: Sequence[int],
    longest: Sequence[int],
    places: dict[int, int],
    progress: Progress,
) -> tuple[int, Any, float, float]:
    """Return the memory before a step, what the longest batch keeps, and the seconds of a step and
    of a look at one batch."""
    run = Run(student, data, schedule, progress)
    with torch.no_grad():  # mapped weights are in memory when they have been used
        outputs_of(student, data.rows.batch([places[usual[0]]]))
    held = resident()
    with counting_kept(student.module) as kept:
        run.take([places[i] for i in longest])
    seconds = []
    for done in range(PROBES):
        began = time.monotonic()
        run.take([places[i] for i in usual])
        seconds.append(time.monotonic() - began)
        progress(Event(stage="probe", done=done + 1, total=PROBES, unit="steps"))
    began = time.monotonic()
    with torch.no_grad():
        measure(student, data, data.held_out)
    return held, kept, min(seconds), time.monotonic() - began
