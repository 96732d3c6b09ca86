"""A student with a delta attached and what it learns from, small enough to test each step."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from kilodelta.compress.distill.learn.comparisons import comparison_for
from kilodelta.compress.distill.learn.data import Data
from kilodelta.compress.distill.learn.objective import Objective
from kilodelta.compress.distill.learn.outputs import Wanted
from kilodelta.compress.distill.learn.rows import Rows
from kilodelta.compress.distill.learn.survey import survey
from kilodelta.compress.distill.teacher.ask import ask
from kilodelta.compress.training import train
from kilodelta.format.methods import Nola
from kilodelta.models.heads import EMBEDDING
from kilodelta.models.loaded import LoadedModel
from kilodelta.progress import Event


class Encoder(nn.Module):
    """Embeds vectors of six; the loss of an embedding draws neighbours by chance."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Linear(6, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {EMBEDDING: self.head(torch.tanh(self.body(x)))}


def loaded(seed: int) -> LoadedModel:
    return LoadedModel(source="encoder", module=Encoder(seed).eval(), kind="any", names={})


def task() -> tuple[LoadedModel, Data]:
    """A student with a delta attached, and what it learns from; the same every time."""
    student, tuned = loaded(1), loaded(2)
    torch.manual_seed(3)
    rows = Rows(tuple({"x": torch.randn(6)} for _ in range(40)), {})
    seen = survey(tuned, rows, Wanted())
    teacher, seen = ask(tuned, rows, seen, lambda event: None)
    learned, held_out = list(range(10, 40)), list(range(10))
    bank = teacher.bank(EMBEDDING, learned)
    objective = Objective(
        outputs=seen.matched, comparisons=[comparison_for(seen.matched[0], bank=bank)]
    )
    train.attach(student.module, Nola(rank=2, bases=30), "*.weight", seed=7, extras="head.bias")
    data = Data(
        rows=rows,
        teacher=teacher,
        objective=objective,
        survey=seen,
        learned=learned,
        held_out=held_out,
        repeated=0,
    )
    return student, data


def interrupt_at(step: int) -> Callable[[Event], None]:
    def progress(event: Event) -> None:
        if event.done == step:
            signal.raise_signal(signal.SIGINT)

    return progress


def silent(event: Event) -> None:
    """Say nothing."""


def coefficients(model: LoadedModel) -> dict[str, Tensor]:
    return {name: values.clone() for name, values in model.module.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def near_task(size: float) -> tuple[LoadedModel, Data]:
    """The same student, and a tuned model that is `size` of the usual way from it."""
    student, data = task()
    apart = {n: v - coefficients(loaded(1))[n] for n, v in coefficients(loaded(2)).items()}
    tuned = loaded(1)
    with torch.no_grad():
        for name, parameter in tuned.module.named_parameters():
            parameter.add_(size * apart[name])
    teacher, _ = ask(tuned, data.rows, data.survey, silent)
    bank = teacher.bank(EMBEDDING, data.learned)
    objective = replace(
        data.objective, comparisons=[comparison_for(data.survey.matched[0], bank=bank)]
    )
    return student, replace(data, teacher=teacher, objective=objective)
