"""Every objective against its formula, as loops of Python's float64, loss and gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from kilodelta.compress.distill.learn.comparisons import (
    SHARPNESS,
    Classes,
    Comparison,
    Head,
    Labels,
    Relational,
    States,
    TopClasses,
    Values,
)
from kilodelta.compress.distill.teacher.top_k import shorten

Vector = Sequence[float]
WEIGHTS = (1.0, 0.0, 1.0, 1.0)
BANK = torch.randn(5, 3, generator=torch.Generator().manual_seed(4))
LABELS = torch.randn(2, 3, generator=torch.Generator().manual_seed(5))


def softmax(logits: Vector) -> list[float]:
    top = max(logits)
    each = [math.exp(x - top) for x in logits]
    return [x / sum(each) for x in each]


def divergence(teacher: Vector, student: Vector) -> float:
    return sum(p * math.log(p / q) for p, q in zip(teacher, student, strict=True))


def unit(v: Vector) -> list[float]:
    size = math.sqrt(sum(x * x for x in v))
    return [x / size for x in v]


def dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def classes(s: Vector, t: Vector) -> float:
    return divergence(softmax(t), softmax(s))


def softened(s: Vector, t: Vector) -> float:
    """Half the divergence, half of four times that of halved logits."""
    halves = [[x / 2 for x in v] for v in (s, t)]
    return 0.5 * classes(s, t) + 0.5 * 4 * classes(halves[0], halves[1])


def shortened(s: Vector, t: Vector) -> float:
    """The two likeliest classes and the rest."""
    p, q = softmax(t), softmax(s)
    top = sorted(range(len(p)), key=lambda i: -p[i])[:2]
    lumped = [[r[i] for i in top] + [1 - sum(r[i] for i in top)] for r in (p, q)]
    return divergence(lumped[0], lumped[1])


def labels(s: Vector, t: Vector) -> float:
    def yes(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    return sum(
        divergence([yes(b), 1 - yes(b)], [yes(a), 1 - yes(a)]) for a, b in zip(s, t, strict=True)
    )


def relational(s: Vector, t: Vector) -> float:
    bank = [unit(row) for row in BANK.tolist()]
    near = [[SHARPNESS * dot(unit(v), row) for row in bank] for v in (s, t)]
    return classes(near[0], near[1]) + 1 - dot(unit(s), unit(t))


def head(s: Vector, t: Vector) -> float:
    rows = [unit(row) for row in LABELS.tolist()]
    near = [[SHARPNESS * dot(unit(v), row) for row in rows] for v in (s, t)]
    return softened(near[0], near[1]) + 0.7 * (1 - dot(unit(s), unit(t)))


def mean(each: Sequence[float]) -> float:
    return dot(each, WEIGHTS) / sum(WEIGHTS)


def averaged(of: Callable[[Vector, Vector], float]) -> Callable[[Any, Any], float]:
    return lambda s, t: mean([of(a, b) for a, b in zip(s, t, strict=True)])


def states(student: Sequence[Vector], teacher: Sequence[Vector]) -> float:
    """The mean square error over the mean square."""

    def square(v: Vector) -> float:
        return dot(v, v) / len(v)

    errors = [
        square([a - b for a, b in zip(s, t, strict=True)])
        for s, t in zip(student, teacher, strict=True)
    ]
    return mean(errors) / mean([square(t) for t in teacher])


FORMULAS: Mapping[str, tuple[Comparison, Callable[[Any, Any], float], int]] = {
    "classes": (Classes(), averaged(softened), 4),
    "shortened": (TopClasses(), averaged(shortened), 4),
    "labels": (Labels(), averaged(labels), 3),
    "states": (States(), states, 3),
    "values": (Values(), states, 1),
    "relational": (Relational(BANK), averaged(relational), 3),
    "head": (Head(LABELS, pull=0.7), averaged(head), 3),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_loss_and_gradient_are_the_formula_s(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient by central differences of the formula: an error of 1e-9 in float64, far below
    float32's 1e-6 of the loss."""
    comparison, formula, width = FORMULAS[name]
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(4, width, generator=generator, requires_grad=True)
    teacher = torch.randn(4, width, generator=generator)
    target = shorten(teacher, 2) if name == "shortened" else teacher
    monkeypatch.setattr(torch, "randint", lambda *a, **k: torch.arange(len(BANK)))
    loss = comparison.loss(student, target, torch.tensor(WEIGHTS), generator)
    s, t = student.tolist(), teacher.tolist()
    assert loss.item() == pytest.approx(formula(s, t), rel=1e-5, abs=1e-6)
    (found,) = torch.autograd.grad(loss, student)
    for row in range(4):
        for column in range(width):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [list(line) for line in s]
                moved[row][column] += step
                ends.append(formula(moved, t))
            slope = (ends[0] - ends[1]) / 2e-5
            assert found[row, column].item() == pytest.approx(slope, rel=1e-3, abs=2e-5)
    if name != "states" and name != "values":
        assert bool((found[1] == 0).all())  # a position that does not count
