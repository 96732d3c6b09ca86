"""Choose the type that a training multiplies in by what its rounding does to this very base.

Rows of 8-bit codes share a factor, so a few large activations leave the others few codes; some
models have such activations (LLM.int8(), arXiv 2208.07339). A student that computes with rounded
weights learns to undo the rounding, which the merged model has not. So the base in 8 bits must be
far nearer to itself in float32 than it is to the tuned model.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from kilodelta.compress.distill.learn.data import Data
from kilodelta.compress.distill.learn.measure import measure
from kilodelta.compress.distill.planning.memory import available
from kilodelta.compress.distill.teacher.ask import compute
from kilodelta.compress.training.products.narrowing import Narrowed, can_narrow
from kilodelta.compress.training.products.rounded import FLOAT32, PRODUCTS
from kilodelta.errors import InputError
from kilodelta.models import LoadedModel
from kilodelta.progress import silent
from kilodelta.sizes import byte_label

TRIED = 32
"""The most held-out rows that a type is tried on; no more than a step has, so that it costs one."""
SHARE = 0.01
"""The most that rounding may move the base, as a share of its divergence from the tuned model."""


@torch.no_grad()
def suiting(student: LoadedModel, data: Data, products: Sequence[str], batch: int) -> str:
    """Return the first of some types that suits a base.

    Args:
        student: the base; nothing is attached to it yet.
        data: what is learnt from; a few held-out rows are computed where there is a choice.
        products: the types, the fastest first. A single one is taken as it is.
        batch: rows of a step.

    Returns:
        A name of `kilodelta.compress.training.products.rounded`, the same in every process.

    Raises:
        InputError: the only type holds more of the weights than fits into memory.
    """
    if data.ranks.in_step:  # a sharded weight is whole only while its layer computes
        return FLOAT32
    if len(products) == 1:
        _require_room(student, products[0])
        return products[0]
    for name in products[:-1]:
        held, free = _room(student, name)
        if data.ranks.any(held > free // 2):
            continue
        chosen = data.held_out[: min(TRIED, batch)]
        if not held or not data.ranks.any(not moved_by(student, data, name, chosen) <= SHARE):
            return name  # NaN is not less
    return products[-1]


@torch.no_grad()
def moved_by(student: LoadedModel, data: Data, products: str, chosen: Sequence[int]) -> float:
    """Measure how far a base in a narrow type is from itself, over its divergence from the teacher.

    Both are divergences of the outputs that are matched, over the same rows.

    Args:
        student: the base; nothing is attached to it yet.
        data: its processes share the rows.
        products: the type.
        chosen: indices of the rows that it is measured on.
    """
    teacher = measure(student, data, chosen)
    rows = data.rows.subset(chosen)
    itself = replace(data, rows=rows, teacher=compute(student, rows, data.survey, silent))
    narrow = Narrowed.of(student.module, products)
    assert narrow is not None  # nobody asks for float32
    with narrow.used():
        moved = measure(student, itself, range(len(chosen)))
    apart = data.objective.overall(teacher).divergence
    return data.objective.overall(moved).divergence / max(apart, 1e-30)


def _room(student: LoadedModel, products: str) -> tuple[int, int]:
    """Return the bytes that a type holds beside the weights, and those that are free."""
    if products == FLOAT32:
        return 0, 0
    how = PRODUCTS[products]()
    layers = can_narrow(student.module, how)
    held = sum(how.held_bytes(layer.weight) for layer in layers)
    free = available(next(student.module.parameters()).device)
    return held, sys.maxsize if free is None else free


def _require_room(student: LoadedModel, products: str) -> None:
    held, free = _room(student, products)
    if held > free:
        raise InputError(
            f"weights as 8-bit codes take {byte_label(held)}, and {byte_label(free)} are free",
            fix="give --dtype mixed, which holds no copies, or fp32",
        )
