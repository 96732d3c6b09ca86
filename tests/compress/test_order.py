"""The order of a training's rows: passes first, then draws by divergence."""

from __future__ import annotations

import io
from collections import Counter

import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor

from kilodelta.compress.distill.learn.comparisons import Classes, States, TopClasses
from kilodelta.compress.distill.learn.objective import Objective
from kilodelta.compress.distill.learn.order import HARD, Order
from kilodelta.compress.distill.learn.outputs import Output
from kilodelta.compress.distill.learn.rows import MASK, Rows


def texts(*lengths: int) -> Rows:
    """Make padded rows of so many tokens each."""
    return Rows(tuple({MASK: torch.ones(n)} for n in lengths), {MASK: torch.tensor(0)})


def images(*widths: int) -> Rows:
    """Make rows that are not padded: only those of one width share a batch."""
    return Rows(tuple({"pixels": torch.zeros(n)} for n in widths), {})


def take(order: Order, batches: int) -> list[list[int]]:
    return [order.next() for _ in range(batches)]


def see_all(order: Order, divergences: Tensor) -> None:
    """Let an order know the divergences of rows 0, 1, ... as of one batch."""
    order.note(range(len(divergences)), divergences)


def test_few_positions_of_a_step_are_padding() -> None:
    """Texts of 3 to 40 tokens: rows of a batch are nearly of one length, shuffled and drawn."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 41, (2048,), generator=generator).tolist()
    order = Order(texts(*lengths), range(2048), 32, seed=0)
    for drawn in (False, True):
        batches = take(order, 64)
        used = [lengths[row] for batch in batches for row in batch]
        padded = sum(32 * max(lengths[row] for row in batch) for batch in batches)
        assert padded < 1.04 * sum(used)
        if not drawn:
            assert sorted(row for batch in batches for row in batch) == list(range(2048))
        see_all(order, torch.rand(2048, generator=generator))


def test_without_a_measure_every_pass_takes_every_row_once() -> None:
    learned = [7, 3, 11, 0, 5, 2]
    order = Order(texts(*[4] * 12), learned, 2, seed=1)
    passes = [[row for batch in take(order, 3) for row in batch] for _ in range(3)]
    assert [sorted(one) for one in passes] == [sorted(learned)] * 3
    assert passes[0] != passes[1]


def test_the_first_pass_takes_every_row_once_whatever_is_noted() -> None:
    order, seen = Order(texts(*[4] * 40), range(40), 4, seed=2), []
    for _ in range(10):
        seen += (batch := order.next())
        order.note(batch, torch.tensor([9.0, 0.0, 0.0, 0.0]))
    assert sorted(seen) == list(range(40))


@pytest.mark.parametrize("rows", [texts(*[5] * 30), images(*[3] * 6, *[4] * 24)])
def test_rows_are_drawn_in_proportion(rows: Rows) -> None:
    """Half of the draws are uniform, half go by divergence."""
    divergences = torch.linspace(0, 3, 30) ** 2
    order = Order(rows, range(30), 6, seed=3)
    take(order, 5)  # the first pass
    see_all(order, divergences)
    batches = take(order, 64 * 60)
    assert all(len({rows.key(row) for row in batch}) == 1 for batch in batches)
    counts = Counter(row for batch in batches for row in batch)
    expected = HARD * divergences / divergences.mean() + 1 - HARD
    for row in range(30):
        share = counts[row] / (6 * len(batches)) * 30
        assert share == pytest.approx(expected[row].item(), abs=0.12), row


def test_what_was_seen_early_is_not_harder_for_that() -> None:
    """The student improves a hundredfold in the first pass; every row is as hard as any other."""
    order, seen = Order(texts(*[4] * 4000), range(4000), 10, seed=4), []
    for step in range(400):
        batch = order.next()
        seen.append(batch)
        order.note(batch, torch.full((10,), 0.01 ** (step / 400)))
    early = {row for batch in seen[:100] for row in batch}
    drawn = [row for batch in take(order, 64 * 4) for row in batch]
    assert sum(row in early for row in drawn) / len(drawn) == pytest.approx(0.25, abs=0.04)


def test_a_measure_that_is_not_finite_is_left_out() -> None:
    order = Order(texts(*[4] * 8), range(8), 4, seed=5)
    take(order, 2)
    see_all(order, torch.ones(8))
    order.note([0, 1], torch.tensor([torch.nan, 1.0]))
    order.note([2, 3], torch.tensor([torch.inf, 1.0]))
    assert len({row for batch in take(order, 64) for row in batch}) == 8


def test_a_student_that_is_right_everywhere_still_gets_batches() -> None:
    order = Order(texts(*[4] * 8), range(8), 4, seed=5)
    take(order, 2)
    see_all(order, torch.zeros(8))
    assert sorted(row for batch in take(order, 2) for row in batch) == list(range(8))


@pytest.mark.parametrize("before", [0, 3, 10, 80])
def test_a_restored_order_goes_on_alike(before: int) -> None:
    rows = images(*[3] * 20, *[4] * 20)
    divergences = torch.rand(40, generator=torch.Generator().manual_seed(6))

    def step(order: Order) -> list[int]:
        batch = order.next()
        order.note(batch, divergences[batch])
        return batch

    order, other = (Order(rows, range(40), 4, seed=6) for _ in range(2))
    for _ in range(before):
        step(order)
    file = io.BytesIO()
    torch.save(order.state(), file)
    file.seek(0)
    other.restore(torch.load(file, weights_only=True))
    assert [step(order) for _ in range(200)] == [step(other) for _ in range(200)]


def test_the_divergence_of_a_row() -> None:
    """The mean divergence over a row's positions that count, over the outputs by weight."""
    torch.manual_seed(7)
    shapes = {"a": (3, 4), "b": (3, 5, 4)}
    student, teacher = ({n: torch.randn(s) for n, s in shapes.items()} for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    a = Output(name="a", kind="classes", weight=0.25, axis=1, size=4, token_axes=())
    b = Output(name="b", kind="classes", weight=0.75, axis=2, size=4, token_axes=(1,))
    found = Objective(outputs=[a, b], comparisons=[Classes()] * 2).row_divergences(
        student, teacher, mask
    )
    assert found is not None
    for row, count in enumerate((5, 2, 1)):
        t, s = (part["b"][row, :count].double().log_softmax(-1) for part in (teacher, student))
        each = (t.exp() * (t - s)).sum(-1).mean()
        t, s = (part["a"][row].double().log_softmax(-1) for part in (teacher, student))
        one = (t.exp() * (t - s)).sum()
        assert found[row].item() == pytest.approx((0.25 * one + 0.75 * each).item(), rel=1e-5)


@pytest.mark.parametrize("other", [States(), TopClasses()])
def test_only_known_classes_tell_rows_apart(other: States | TopClasses) -> None:
    values = {"a": torch.randn(3, 4), "b": torch.randn(3, 4)}
    outputs = [
        Output(name=n, kind="states", weight=0.5, axis=1, size=4, token_axes=()) for n in values
    ]
    objective = Objective(outputs=outputs, comparisons=[Classes(), other])
    assert objective.row_divergences(values, values, None) is None
