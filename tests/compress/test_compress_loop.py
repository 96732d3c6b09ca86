"""The loop of a distillation: what is kept, what is rounded when, how a run stops and goes on."""

from __future__ import annotations

import itertools
import math
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kilodelta.compress.distill.learn import loop, state, steps, watch
from kilodelta.compress.distill.learn.data import Data
from kilodelta.compress.distill.learn.gradient import loss_scale
from kilodelta.compress.distill.learn.loop import distill
from kilodelta.compress.distill.learn.measure import measure
from kilodelta.compress.distill.learn.objective import Measures
from kilodelta.compress.distill.learn.schedule import Distilled, Schedule
from kilodelta.compress.distill.processes.ranks import Ranks
from kilodelta.compress.training import train
from kilodelta.errors import InputError
from kilodelta.format.methods import Nola
from kilodelta.models.heads import EMBEDDING
from kilodelta.models.loaded import LoadedModel
from kilodelta.progress import Event
from tests.support.distilling import (
    Encoder,
    coefficients,
    equal,
    interrupt_at,
    near_task,
    silent,
    task,
)

SCHEDULE = Schedule(steps=16, rate=2e-2, batch=4, bits=4, seed=5)
FACTS = {"inputs": "a", "--steps": "16"}


def test_the_best_rounded_state_is_kept_extras_included(monkeypatch: pytest.MonkeyPatch) -> None:
    student, data = task()
    script = iter([0.8, 0.5, 0.2, 0.9, 0.4])  # the first is where a short training begins
    states: list[dict[str, Tensor]] = []

    def scripted(model: LoadedModel, *rest: Any) -> tuple[Measures, ...]:
        states.append(coefficients(model))
        return (Measures(agreement=0.1 * len(states), divergence=next(script)),)

    monkeypatch.setattr(steps, "measure", scripted)
    done = distill(student, data, SCHEDULE, silent)
    assert [look.divergence for look in done.curve] == [0.5, 0.2, 0.9, 0.4]
    assert [look.step for look in done.curve] == [13, 14, 15, 16]
    assert done.measures == (Measures(agreement=0.1 * 3, divergence=0.2),)
    assert equal(coefficients(student), states[2])
    assert "head.bias" in states[2]
    assert not torch.equal(states[2]["head.bias"], states[4]["head.bias"])


def test_of_equal_states_the_later_one_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    student, data = task()
    looks = itertools.chain([0.6], itertools.repeat(0.5))
    monkeypatch.setattr(
        steps, "measure", lambda *given: (Measures(agreement=0.5, divergence=next(looks)),)
    )
    last: list[dict[str, Tensor]] = []
    distill(student, data, SCHEDULE, lambda event: last.append(coefficients(student)))
    assert equal(coefficients(student), last[-1])


def test_a_look_takes_a_sample_of_the_held_out_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Always the same one, or the states would not be comparable; the end measures all rows."""
    looked_at: list[list[int]] = []

    def recorded(model: LoadedModel, data: Data, chosen: Any) -> tuple[Measures, ...]:
        looked_at.append(list(chosen))
        return measure(model, data, chosen)

    monkeypatch.setattr(steps, "measure", recorded)
    monkeypatch.setattr(steps, "LOOKED_AT", 3)
    student, data = task()
    distill(student, data, SCHEDULE, silent)
    assert looked_at == [[0, 1, 2]] * (1 + steps.EVALUATIONS)


def test_the_last_quarter_trains_rounded() -> None:
    student, data = task()
    bits: list[int | None] = []

    def look(event: Event) -> None:
        precision = train.attached(student.module).precision
        bits.append(None if precision is None else precision.bits)

    distill(student, data, SCHEDULE, look)
    assert bits == [None] * 12 + [4] * 4
    assert SCHEDULE.rounds_from == 12
    assert Schedule(steps=2, rate=1).rounds_from == 1


def test_training_brings_the_student_nearer() -> None:
    student, data = task()
    before = measure(student, data, data.held_out)[0].divergence
    done = distill(student, data, Schedule(steps=60, rate=2e-2, batch=8, bits=8), silent)
    assert done.measures[0].divergence < 0.8 * before


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("step", [1, 5, 12, 13, 15])
def test_a_resumed_run_ends_at_the_same_bits(step: int, tmp_path: Path) -> None:
    whole, data = task()
    wanted = distill(whole, data, SCHEDULE, silent)
    kept = tmp_path / "a.kd.resume"
    first, data = task()
    torch.manual_seed(99)  # what else draws in the process is of no account
    cut = distill(first, data, SCHEDULE, interrupt_at(step), kept=kept, facts=FACTS)
    assert (cut.interrupted, cut.steps) == (True, step)
    again, data = task()
    torch.manual_seed(98)
    found = distill(again, data, SCHEDULE, silent, kept=kept, facts=FACTS, resume=True)
    assert (found.interrupted, found.steps) == (False, 16)
    assert found.measures == wanted.measures
    assert found.curve == wanted.curve
    assert equal(coefficients(again), coefficients(whole))


def stopped(folder: Path) -> Path:
    """The state of a run that was interrupted."""
    student, data = task()
    kept = folder / "a.kd.resume"
    distill(student, data, SCHEDULE, interrupt_at(3), kept=kept, facts=FACTS)
    return kept


@pytest.mark.usefixtures("ctrl_c")
def test_another_run_is_refused_by_what_differs(tmp_path: Path) -> None:
    kept = stopped(tmp_path)
    student, data = task()
    other = {"inputs": "b", "--steps": "16", "--model": "x"}
    with pytest.raises(InputError, match="belongs to a run with other inputs, --model"):
        distill(student, data, SCHEDULE, silent, kept=kept, facts=other, resume=True)
    with pytest.raises(InputError, match="does not exist"):
        distill(student, data, SCHEDULE, silent, kept=tmp_path / "b", resume=True)


@pytest.mark.usefixtures("ctrl_c")
def test_a_damaged_state_is_a_sentence(tmp_path: Path) -> None:
    whole = stopped(tmp_path).read_bytes()
    student, data = task()
    place = tmp_path / "damaged"
    torch.save({"version": 3, "facts": FACTS}, place)
    less = place.read_bytes()
    torch.save([1, 2], place)
    another = place.read_bytes()
    torch.save({"version": 1, "key": "x", "state": nn.Linear(2, 2)}, place)
    code = place.read_bytes()
    cases = {
        "half": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"hello",
        "less": less,
        "another": another,
        "code": code,
    }
    for name, content in cases.items():
        place.write_bytes(content)
        with pytest.raises(InputError, match=r"is damaged|is no state of a run") as caught:
            distill(student, data, SCHEDULE, silent, kept=place, facts=FACTS, resume=True)
        assert "--force" in caught.value.fix, name
    found = torch.load(tmp_path / "a.kd.resume", weights_only=True)
    torch.save({**found, "state": {"other": torch.zeros(1)}}, place)
    with pytest.raises(InputError, match="is damaged"):
        distill(student, data, SCHEDULE, silent, kept=place, facts=FACTS, resume=True)


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    student, data = task()

    def twice(event: Event) -> None:
        if event.done == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        distill(student, data, SCHEDULE, twice, kept=tmp_path / "a.kd.resume")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.fixture
def heard() -> Iterator[None]:
    """SIGTERM interrupts the program, as at the command line."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, stop)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("ctrl_c", "heard")
@pytest.mark.parametrize("step", [3, 16])
def test_a_signal_that_ends_the_program_lets_the_step_end_and_keeps_the_state(
    step: int, tmp_path: Path
) -> None:
    """The last step's too: what comes after it takes a while as well."""
    whole, data = task()
    distill(whole, data, SCHEDULE, silent)
    kept = tmp_path / "a.kd.resume"
    seen: list[int] = []

    def stop(event: Event) -> None:
        seen.append(event.done)
        if event.done == step:
            signal.raise_signal(signal.SIGTERM)

    first, data = task()
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt) as ended:
        distill(first, data, SCHEDULE, stop, kept=kept, facts=FACTS)
    assert ended.value.args == (signal.SIGTERM,)
    assert seen == list(range(1, step + 1))
    assert signal.getsignal(signal.SIGTERM) is handler
    again, data = task()
    distill(again, data, SCHEDULE, silent, kept=kept, facts=FACTS, resume=True)
    assert equal(coefficients(again), coefficients(whole))


def test_one_of_several_processes_ends_at_once() -> None:
    assert loop._signals(Ranks(count=2)) == ("SIGINT",)
    assert "SIGTERM" in loop._signals(Ranks())


def test_a_thread_may_distil() -> None:
    found: list[Distilled] = []
    student, data = task()
    thread = threading.Thread(target=lambda: found.append(distill(student, data, SCHEDULE, silent)))
    thread.start()
    thread.join()
    assert found[0].steps == 16


def test_a_loss_that_is_not_finite_says_what_to_do() -> None:
    student, data = task()
    with torch.no_grad():
        next(student.module.parameters()).fill_(torch.nan)
    with pytest.raises(InputError, match="the loss is nan before the first step: the base's own"):
        distill(student, data, SCHEDULE, silent)


WILD = Schedule(steps=40, rate=1.0, batch=4, bits=8, seed=5)
"""A rate at which a near task's loss grows, and with it the distance on the held-out rows."""
LOW = 1.1
"""Times the first loss that count as astray here."""


def test_a_training_that_goes_astray_begins_again_at_a_lower_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "ASTRAY", LOW)
    student, data = near_task(0.3)
    done = distill(student, data, WILD, silent)
    assert done.again >= 1
    assert done.steps == 40


def test_a_training_that_leads_away_at_every_rate_keeps_the_best_it_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the first coefficients are nearly the tuned model, no rate brings them nearer."""
    monkeypatch.setattr(watch, "ASTRAY", LOW)
    monkeypatch.setattr(watch, "ATTEMPTS", 0)
    student, data = near_task(0.3)
    done = distill(student, data, WILD, silent)
    assert (done.again, done.steps) == (0, 40)
    best = data.objective.overall(done.measures).divergence
    assert best == min(look.divergence for look in done.curve)


def test_a_loss_that_is_finite_at_no_rate_ends_the_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student, data = task()
    real, tried = steps.Run._gradient, []

    def diverging(run: steps.Run, chosen: Any) -> Tensor:
        if run.step == 2:
            tried.append(run.watch.share)
        return real(run, chosen) * (math.inf if run.step == 2 else 1.0)

    monkeypatch.setattr(steps.Run, "_gradient", diverging)
    with pytest.raises(InputError, match=r"the loss is inf after 2 steps"):
        distill(student, data, SCHEDULE, silent)
    assert tried == [1.0, 1 / 4, 1 / 16, 1 / 64]


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("step", [3, 9, 33])
def test_a_resumed_run_remembers_that_it_began_again(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "ASTRAY", LOW)
    whole, data = near_task(0.3)
    wanted = distill(whole, data, WILD, silent)
    kept = tmp_path / "a.kd.resume"
    first, data = near_task(0.3)
    distill(first, data, WILD, interrupt_at(step), kept=kept, facts=FACTS)
    again, data = near_task(0.3)
    found = distill(again, data, WILD, silent, kept=kept, facts=FACTS, resume=True)
    assert found.again == wanted.again >= 1
    assert equal(coefficients(again), coefficients(whole))


def test_batches_that_differ_are_no_reason_to_begin_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The held-out rows are asked before a training whose loss grew begins again."""
    student, data = task()
    real, looks = steps.Run._gradient, []

    def uneven(run: steps.Run, chosen: Any) -> Tensor:
        return real(run, chosen) * (1.0 if run.step == 0 else 20.0)

    def counted(*given: Any) -> tuple[Measures, ...]:
        looks.append(1)
        return measure(*given)

    monkeypatch.setattr(steps.Run, "_gradient", uneven)
    monkeypatch.setattr(steps, "measure", counted)
    done = distill(student, data, SCHEDULE, silent)
    assert done.again == 0
    assert len(looks) == 1 + 1 + steps.EVALUATIONS  # the start, one doubt, and the last quarter


def test_a_watch_needs_some_losses_and_forgets_them() -> None:
    one = watch.Watch()
    assert [one.is_astray(loss) for loss in (1.0, 9.0, 9.0, 9.0, 9.0)] == [False] * 5
    assert one.is_astray(9.0)
    assert one.begin_again()
    assert (one.share, one.seen) == (0.25, 0)
    assert one.is_astray(float("nan"))
    falling = watch.Watch()
    assert not any(falling.is_astray(1.0 / n) for n in range(1, 50))
    assert watch.Watch.of(one.state()) == one or one.state()["again"] == 1


def test_a_model_that_is_the_tuned_one_is_not_led_away_by_rounding() -> None:
    """An SVD may begin at divergence 0, which no rounded coefficients have."""
    one = watch.Watch(start=0.0)
    assert not one.has_harmed(1e-6)
    assert one.has_harmed(1e-4)
    assert watch.Watch(start=1e-4).has_harmed(1e-4)


FEW = Schedule(steps=6, rate=0.1, batch=4, bits=8, seed=5)
"""At this rate six steps bring a tuned model that is far nearer, and lead away from a near one."""


def test_few_steps_far_from_the_tuned_model_take_the_full_rate() -> None:
    student, data = task()
    before = measure(student, data, data.held_out)[0].divergence
    done = distill(student, data, FEW, silent)
    assert (done.again, done.steps) == (0, 6)
    assert done.measures[0].divergence < 0.9 * before


def test_few_steps_that_lead_away_are_taken_anew_at_a_lower_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student, data = near_task(0.1)
    before = measure(student, data, data.held_out)[0].divergence
    seen: list[int] = []
    done = distill(student, data, FEW, lambda event: seen.append(event.done))
    assert 1 <= done.again <= watch.ATTEMPTS
    assert len(seen) == 6 * (1 + done.again)
    assert seen[-6:] == [1, 2, 3, 4, 5, 6]
    assert done.measures[0].divergence < before
    assert [look.step for look in done.curve] == [5, 6]  # of the last attempt
    monkeypatch.setattr(watch, "ATTEMPTS", 0)
    monkeypatch.setattr(watch, "ASTRAY", math.inf)
    student, data = near_task(0.1)
    done = distill(student, data, FEW, silent)
    assert done.again == 0
    assert done.measures[0].divergence > before  # what it is for


def test_a_training_of_many_steps_is_not_taken_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "SHORT", 6)
    student, data = near_task(0.1)
    seen: list[int] = []
    distill(student, data, FEW, lambda event: seen.append(event.done))
    assert seen == [1, 2, 3, 4, 5, 6]


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("step", [4, 6, 8])
def test_a_run_that_was_stopped_in_any_attempt_ends_the_same(step: int, tmp_path: Path) -> None:
    """Step 6 of the first attempt is where it begins anew; 8 is the second one's second."""
    whole, data = near_task(0.1)
    wanted = distill(whole, data, FEW, silent)
    kept, events = tmp_path / "a.kd.resume", iter(range(1, 100))

    def stop(event: Event) -> None:
        if next(events) == step:
            signal.raise_signal(signal.SIGINT)

    first, data = near_task(0.1)
    cut = distill(first, data, FEW, stop, kept=kept, facts=FACTS)
    assert cut.interrupted
    again, data = near_task(0.1)
    found = distill(again, data, FEW, silent, kept=kept, facts=FACTS, resume=True)
    assert (found.interrupted, found.again) == (False, wanted.again)
    assert found.curve == wanted.curve
    assert equal(coefficients(again), coefficients(whole))


class Unscaled(nn.Module):
    """An encoder in float16 whose gradients are below what float16 holds."""

    def __init__(self, small: float) -> None:
        super().__init__()
        self.inner = Encoder(1)
        self.small = small

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        out = self.inner(x.to(self.inner.head.weight.dtype))[EMBEDDING]
        return {EMBEDDING: _Smaller.apply(out, self.small)}  # type: ignore[no-untyped-call]


class _Smaller(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return values.float()

    @staticmethod
    def backward(ctx: Any, grown: Tensor) -> tuple[Tensor, None]:
        return (grown * ctx.factor).half(), None


def half_run(small: float) -> tuple[steps.Run, list[int]]:
    _, data = task()
    student = LoadedModel(source="e", module=Unscaled(small).half().eval(), kind="any", names={})
    train.attach(student.module, Nola(rank=2, bases=30), "*.weight", seed=7)
    return steps.Run(student, data, replace(SCHEDULE, steps=200), silent), list(data.learned[:8])


def test_float16_gradients_are_scaled_into_its_range() -> None:
    """On a CPU, which computes in float16 slowly but truly."""
    run, rows = half_run(2.0**-27)
    before = [p.detach().clone() for p in run.masters]
    assert run.scale == loss_scale.LossScale(scale=loss_scale.FIRST, active=True)
    scaled = run.take(rows)
    assert all(p.grad is not None for p in run.masters)
    assert any(bool((p.grad != 0).any()) for p in run.masters if p.grad is not None)
    assert any(not torch.equal(a, b) for a, b in zip(before, run.masters, strict=True))
    other, rows = half_run(2.0**-27)
    other.scale = loss_scale.LossScale()
    assert other.take(rows) == pytest.approx(scaled, rel=1e-6)  # the loss that is said is unscaled
    assert not any(bool((p.grad != 0).any()) for p in other.masters if p.grad is not None)


def test_a_step_whose_scaled_gradient_overflows_is_left_out_and_the_scale_halved() -> None:
    run, rows = half_run(2.0**8)
    before = [p.detach().clone() for p in run.masters]
    run.take(rows)
    assert run.scale.scale == loss_scale.FIRST / 2
    assert all(torch.equal(a, b) for a, b in zip(before, run.masters, strict=True))
    for _ in range(20):
        run.take(rows)
    assert run.scale.scale < loss_scale.FIRST / 2
    assert run.scale.since > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, run.masters, strict=True))
    assert loss_scale.LossScale.of(run.state()["scale"]) == run.scale
    never, rows = half_run(float("inf"))
    never.scale.scale = loss_scale.SMALLEST
    with pytest.raises(InputError, match="the gradient is not finite in float16"):
        never.take(rows)


def test_a_scale_grows_after_many_steps_and_gives_exact_gradients() -> None:
    scale = loss_scale.LossScale(scale=4.0, since=loss_scale.GROWS_AFTER - 1, active=True)
    gradient = torch.tensor([4.0, -0.4])
    assert scale.accepts([gradient])
    assert torch.equal(gradient, torch.tensor([1.0, -0.1]))
    assert (scale.scale, scale.since) == (8.0, 0)
    off = loss_scale.LossScale()
    assert off.accepts([torch.tensor([float("inf")])])
    assert off == loss_scale.LossScale()


def test_where_a_state_lies() -> None:
    assert state.place_of(Path("x/task.kd")) == Path("x/task.kd.resume")
