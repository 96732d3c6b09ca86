"""Measure what the same bytes keep by other ways: an SVD of the change, and a LoRA trained alike.

Both are written and merged as the file is: 4-bit (or the file's) integer factors, held-out inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from kilodelta.compress.distill import svd
from kilodelta.compress.distill.budget import size_of
from kilodelta.compress.distill.job import Job
from kilodelta.compress.distill.learn.data import Data
from kilodelta.compress.distill.learn.loop import distill
from kilodelta.compress.distill.learn.measure import measure
from kilodelta.compress.distill.learn.schedule import Schedule
from kilodelta.compress.distill.merged import fill_merged
from kilodelta.compress.distill.report import Report, Size
from kilodelta.compress.distill.student import attach_student, build_delta, literal
from kilodelta.compress.training import train
from kilodelta.errors import InputError
from kilodelta.format.delta import Delta
from kilodelta.format.methods import Lora
from kilodelta.format.targets import Patterns, Target
from kilodelta.merging.build import Recipe, build
from kilodelta.models import LoadedModel
from kilodelta.models.weights import fill
from kilodelta.progress import Event, Progress

BITS = 4
TIMES = (1, 4, 10)
"""Sizes of the SVDs, by the file's coefficients; the rank of a LoRA is a whole number."""
SVD, LORA = f"SVD of the change, {BITS} bits", "LoRA, trained alike"


def ranks(targets: Sequence[Target], nbytes: int) -> tuple[int, ...]:
    """Return the ranks whose 4-bit factors come nearest below multiples of `nbytes`; 1 at least.

    Example:
        >>> target = Target(name="w", dtype="F32", shape=(60, 40), transposed=False, index=0)
        >>> ranks([target], 200)
        (4, 16, 40)
    """
    widths = sum(sum(target.matrix) for target in targets)
    full = min(min(target.matrix) for target in targets)
    wanted = (max(1, times * nbytes * 8 // (BITS * widths)) for times in TIMES)
    return tuple(sorted({min(rank, full) for rank in wanted}))


def affordable(
    targets: Sequence[Target], norms: Mapping[str, float], nbytes: int, bits: int
) -> tuple[Lora, tuple[Target, ...]] | None:
    """Choose the LoRA that bytes buy: of every target, or of rank 1 of the most changed ones.

    Args:
        targets: what the file changes.
        norms: of each target's change, by name.
        nbytes: bytes of the coefficients.
        bits: of a coefficient.

    Returns:
        The method, and what it changes, in the targets' order; where rank 1 of all targets costs
        too much, those with the most energy of the change for their bytes. None where not even one
        target can be had.

    Example:
        >>> shape = {"dtype": "F32", "shape": (60, 40), "transposed": False}
        >>> both = [Target(name=name, index=i, **shape) for i, name in enumerate("ab")]
        >>> affordable(both, {"a": 1.0, "b": 2.0}, 200, 4)[0].rank
        2
        >>> [target.name for target in affordable(both, {"a": 1.0, "b": 2.0}, 60, 4)[1]]
        ['b']
    """
    full = min(min(target.matrix) for target in targets)
    rank = min(full, nbytes * 8 // (bits * sum(sum(target.matrix) for target in targets)))
    while rank > 0 and size_of(Lora(rank=rank), targets, bits) > nbytes:
        rank -= 1  # the last byte of a group may be half empty
    if rank > 0:
        return Lora(rank=rank), tuple(targets)
    method, left, chosen = Lora(rank=1), nbytes, set()
    for target in sorted(targets, key=lambda t: -(norms[t.name] ** 2) / sum(t.matrix)):
        cost = size_of(method, [target], bits)
        if cost <= left:
            left -= cost
            chosen.add(target.name)
    return (method, tuple(t for t in targets if t.name in chosen)) if chosen else None


def with_baselines(
    report: Report,
    wanted: Sequence[str],
    job: Job,
    student: LoadedModel,
    data: Data,
    schedule: Schedule,
    progress: Progress,
) -> Report:
    """Add the sizes of a report's picture: the file, and other ways to spend about its bytes.

    Args:
        report: what was measured of the file.
        wanted: `svd`, for about as many bytes and more; `lora`, which trains once more.
        job: what was settled before.
        student: the base with the file merged into it; it holds the last baseline afterwards.
        data: the held-out inputs and the teacher's outputs on them.
        schedule: how the file was trained.
        progress: called for each target of each SVD, and for each step of the LoRA.
    """
    if report.after is None:
        return report
    sizes = [Size(name="this file", nbytes=report.nbytes["file"], agreement=report.after.agreement)]
    if "svd" in wanted:
        sizes += _svds(report, job, student, data, progress)
    # A file that is a LoRA is that baseline itself.
    warnings = report.warnings
    if "lora" in wanted and not isinstance(job.method, Lora):
        try:
            sizes += _lora(report, job, student, data, schedule, progress)
        except InputError as error:  # the file is written, and is as good without a baseline
            warnings = (*warnings, f"no LoRA was trained beside the file: {error.what}")
    return replace(report, sizes=tuple(sizes), warnings=warnings)


def _svds(
    report: Report, job: Job, student: LoadedModel, data: Data, progress: Progress
) -> list[Size]:
    """Measure truncated SVDs of the change, which nothing trains."""
    sizes = []
    for rank in ranks(job.targets, report.nbytes["coefficients"]):
        method = Lora(rank=rank)
        fitted = svd.fit(job.pair.base, job.pair.tuned, job.targets, method, BITS, progress)
        recipe = Recipe(method=method, patterns=job.patterns, bits=BITS, name=job.name)
        delta = build(job.pair.base, recipe, fitted, progress=progress)
        sizes.append(_measured(SVD, f"rank {rank}", delta, report, job, student, data))
    return sizes


def _lora(
    report: Report,
    job: Job,
    student: LoadedModel,
    data: Data,
    schedule: Schedule,
    progress: Progress,
) -> list[Size]:
    """Train a LoRA of as many bytes on the same inputs, steps and bits, at LoRA's own rate."""
    norms = {change.name: change.norm for change in job.changes}
    bought = affordable(job.targets, norms, report.nbytes["coefficients"], job.bits)
    if bought is None:
        return []
    method, targets = bought
    patterns = job.patterns
    if len(targets) < len(job.targets):
        patterns = Patterns(include=tuple(literal(target.name) for target in targets))
    other = replace(job, method=method, targets=targets, patterns=patterns)
    names = job.pair.names
    fill(student.module, job.pair.base, {t.name: names[t.name] for t in job.targets})
    attach_student(other)
    try:
        done = distill(student, data, replace(schedule, rate=method.rate), _beside(progress))
        delta = build_delta(other, progress)
    finally:
        train.detach(student.module)
    if done.interrupted:  # half a training is no baseline; the file itself is written
        return []
    how = f"rank {method.rank} of {len(targets)} of {len(job.targets)} tensors"
    return [_measured(LORA, how, delta, report, job, student, data)]


def _measured(
    name: str,
    how: str,
    delta: Delta,
    report: Report,
    job: Job,
    student: LoadedModel,
    data: Data,
) -> Size:
    """Merge a baseline into the student and measure it; its file has the report's header."""
    beside = report.nbytes["file"] - report.nbytes["coefficients"]
    fill_merged(student.module, delta, job.pair.base, job.pair.names)
    kept = data.objective.overall(measure(student, data, data.held_out))
    return Size(name=name, nbytes=delta.blob.size + beside, agreement=kept.agreement, how=how)


def _beside(progress: Progress) -> Progress:
    """Say at every stage that it is the baseline's."""

    def tell(event: Event) -> None:
        progress(replace(event, stage=f"{event.stage} (LoRA)"))

    return tell
