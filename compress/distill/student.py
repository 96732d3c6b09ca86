"""Attach a delta to the student, and make a file's delta of what it was trained to.

A decoder puts out hidden states for as long as it learns, where its logits can be computed late.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from kilodelta.compress.distill import svd
from kilodelta.compress.distill.job import Job, as_dtype
from kilodelta.compress.distill.learn.data import Data
from kilodelta.compress.distill.learn.late_head import LOGITS, LateTopClasses, find_head, late
from kilodelta.compress.training import train
from kilodelta.compress.training.conversion import quantised
from kilodelta.format.delta import Delta
from kilodelta.format.methods import Lora
from kilodelta.merging.build import Recipe, build
from kilodelta.models import LoadedModel
from kilodelta.models.weights import fill
from kilodelta.progress import Progress


def attach_student(job: Job) -> None:
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


def build_delta(job: Job, progress: Progress) -> Delta:
    """Make the trained delta, its extras in the types that files keep them in."""
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
    return build(job.built_on, recipe, own, shared, progress=progress)


@contextmanager
def late_logits(job: Job, student: LoadedModel, data: Data) -> Iterator[Data]:
    """Let a decoder's logits be computed in the loss in this block, where that gives the same.

    Args:
        job: what is trained; a head that is, is left alone.
        student: nothing is attached to it yet.
        data: what it learns from.

    Yields:
        The data, compared by hidden states where the block's student puts these out.
    """
    names = [target.name for target in job.targets] + [c.name for c in job.split.extras]
    trained = [job.pair.names[name] for name in names if name in job.pair.names]
    head = find_head(student, data.rows, data.survey, trained)
    if head is None:
        yield data
        return
    with late(head):
        plain = data.objective
        comparisons = [
            LateTopClasses(head) if output.name == LOGITS else comparison
            for output, comparison in zip(plain.outputs, plain.comparisons, strict=True)
        ]
        yield replace(data, objective=replace(plain, comparisons=comparisons))
