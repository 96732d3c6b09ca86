"""Attach a delta to the student, and make a file's delta of what it was trained to.

A decoder puts out hidden states for as long as it learns, where its logits can be computed late,
and weights that the base stores in a narrower type stay in its files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from kilodelta.compress.distill import svd
from kilodelta.compress.distill.job import Job, as_dtype
from kilodelta.compress.distill.learn.data import Data
from kilodelta.compress.distill.learn.late_head import LOGITS, LateTopClasses, find_head, late
from kilodelta.compress.distill.learn.outputs import run
from kilodelta.compress.training import train
from kilodelta.compress.training.conversion import quantised
from kilodelta.compress.training.products.widening import can_widen, widened
from kilodelta.format.delta import Delta
from kilodelta.format.methods import Lora
from kilodelta.memory import give_back
from kilodelta.merging.build import Recipe, build
from kilodelta.models import LoadedModel
from kilodelta.models.weights import TORCH, MappedCheckpoint, fill
from kilodelta.progress import Progress

NARROW = (torch.bfloat16, torch.float16)


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


@contextmanager
def weights_as_stored(job: Job, student: LoadedModel, data: Data) -> Iterator[None]:
    """Map the frozen weights of linear layers in this block where float32 would copy them.

    What a model's code does with a layer's weight beside the layer's product is not known. So the
    outputs on a row of the inputs must stay what they were, bit for bit; otherwise the copies
    remain.

    Args:
        job: what is trained; rounding to a grid takes whole weights, which then stay copies.
        student: the delta attached.
        data: what it learns from, of which one row is tried.
    """
    takes_copies = bool(job.precisions) or data.ranks.in_step
    layers = {} if takes_copies else can_widen(student.module, _stored_whole(job))
    stored = _stored(job, layers) if layers else {}
    with ExitStack() as stack:
        if stored:
            before = _outputs(student, data)
            stack.enter_context(widened(layers, stored))
            give_back()
            after = _outputs(student, data)
            if not all(map(torch.equal, before, after)):
                stack.close()
            del before, after
        yield


def _stored_whole(job: Job) -> set[str]:
    """Return the state names of tensors that the file holds whole."""
    names = job.pair.names
    return {names[change.name] for change in job.split.extras if change.name in names}


def _stored(job: Job, layers: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
    """Return the weights of layers that the base's files hold in a narrower type, by state name."""
    pair = job.pair
    files = MappedCheckpoint(pair.base)
    places = {pair.names[n]: n for n in pair.base.names if n in pair.names}
    narrow = {
        state: name
        for state, name in places.items()
        if state in layers
        and TORCH.get(pair.base.info(name).dtype) in NARROW
        and pair.base.info(name).shape == tuple(layers[state].weight.shape)
    }
    found = {state: files.tensor(name) for state, name in narrow.items()}
    return {state: values for state, values in found.items() if values is not None}


def _outputs(student: LoadedModel, data: Data) -> list[Tensor]:
    """Compute a row as a step does, and as a measurement does."""
    batch = data.rows.batch([data.learned[0]])
    found = []
    for grown in (True, False):
        with torch.set_grad_enabled(grown):
            outputs = run(student, batch, one_row=data.survey.one_row)
        found += [values.detach() for values in outputs.values()]
    return found
