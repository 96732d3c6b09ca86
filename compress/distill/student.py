"""Attach a delta to the student, and make a file's delta of what it was trained to."""

from __future__ import annotations

from kilodelta.compress.distill import svd
from kilodelta.compress.distill.job import Job, as_dtype
from kilodelta.compress.training import train
from kilodelta.compress.training.conversion import quantised
from kilodelta.format.delta import Delta
from kilodelta.format.methods import Lora
from kilodelta.merging.build import Recipe, build
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
    return build(job.pair.base, recipe, own, shared, progress=progress)
