"""Measure what the same bytes keep without training: truncated SVDs of the change, in 4 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kilodelta.compress.distill import svd
from kilodelta.compress.distill.job import Job
from kilodelta.compress.distill.learn.data import Data
from kilodelta.compress.distill.learn.measure import measure
from kilodelta.compress.distill.merged import fill_merged
from kilodelta.compress.distill.report import Report, Size
from kilodelta.format.methods import Lora
from kilodelta.format.targets import Target
from kilodelta.merging.build import Recipe, build
from kilodelta.models.loaded import LoadedModel
from kilodelta.progress import Progress

BITS = 4
TIMES = (1, 4, 10)
"""Sizes of the baselines, by the file's coefficients; the rank of a LoRA is a whole number."""


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


def with_baselines(
    report: Report, job: Job, student: LoadedModel, data: Data, progress: Progress
) -> Report:
    """Add the sizes of a report's picture: the file, and SVDs of about as many bytes and more.

    Args:
        report: what was measured of the file.
        job: what was settled before.
        student: the base with the file merged into it; it holds the last SVD afterwards.
        data: the held-out inputs and the teacher's outputs on them.
        progress: called for each target of each SVD.
    """
    if report.after is None:
        return report
    own = Size(name="this file", nbytes=report.nbytes["file"], agreement=report.after.agreement)
    beside = own.nbytes - report.nbytes["coefficients"]
    sizes = [own]
    for rank in ranks(job.targets, report.nbytes["coefficients"]):
        method = Lora(rank=rank)
        fitted = svd.fit(job.pair.base, job.pair.tuned, job.targets, method, BITS, progress)
        recipe = Recipe(method=method, patterns=job.patterns, bits=BITS, name=job.name)
        delta = build(job.pair.base, recipe, fitted, progress=progress)
        fill_merged(student.module, delta, job.pair.base, job.pair.names)
        kept = data.objective.overall(measure(student, data, data.held_out))
        sizes.append(
            Size(
                name=f"SVD of the change, {BITS} bits",
                nbytes=delta.blob.size + beside,
                agreement=kept.agreement,
            )
        )
    return replace(report, sizes=tuple(sizes))
