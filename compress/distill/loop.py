"""Distillation: train a delta's coefficients until the model computes what the tuned one does.

No labels: the tuned model's outputs on the inputs are the target. The last part of the steps runs
with the numbers that the file will hold, so what was measured is what is saved.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kilodelta.compress.distill.data import Data
from kilodelta.compress.distill.objective import Measures, masked_mean
from kilodelta.compress.training import train
from kilodelta.errors import InputError
from kilodelta.models import LoadedModel, outputs
from kilodelta.progress import Event, Progress

EVALUATIONS = 4
"""Times that the held-out inputs are looked at while the rounded coefficients train."""
KEPT_EVERY_S = 30.0
"""Seconds between two writes of the state from which an interrupted run resumes."""
EVALUATED = 64


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast: AdamW, linear warm-up, cosine decay, rounded at the end."""

    steps: int
    rate: float
    batch: int = 32
    warm: float = 0.05
    """Share of the steps in which the rate rises."""
    rounded: float = 0.25
    """Share of the steps, at the end, that run with rounded coefficients."""
    bits: int = 4
    seed: int = 0

    def factor(self, step: int) -> float:
        """The rate at a step as a share of `rate`."""
        warm = max(1, round(self.warm * self.steps))
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, self.steps - warm))))

    @property
    def rounds_from(self) -> int:
        return min(self.steps - 1, round((1 - self.rounded) * self.steps))


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """What a run reached: the best rounded state's measures on the held-out inputs."""

    held_out: Measures
    steps: int
    seconds: float
    interrupted: bool


@dataclass
class _Best:
    """The best rounded coefficients so far."""

    measures: Measures | None = None
    state: dict[str, Tensor] = field(default_factory=dict)

    def offer(self, measures: Measures, state: Mapping[str, Tensor]) -> None:
        if self.measures is None or measures.divergence <= self.measures.divergence:
            self.measures = measures
            self.state = {name: values.detach().clone() for name, values in state.items()}


def distill(
    loaded: LoadedModel,
    data: Data,
    schedule: Schedule,
    progress: Progress,
    *,
    kept: Path | None = None,
    key: str = "",
    resume: bool = False,
) -> Distilled:
    """Train the delta that is attached to `loaded.module`, and leave its best rounded state there.

    Ctrl-C ends the run early with the best state; a second one ends it for good.

    Args:
        kept: where the state of the run is written every half minute, and read on `resume`.
        key: what must be equal for a run to be resumed.

    Raises:
        InputError: the run to resume was another one, or the loss is not finite.
    """
    run = _Run(loaded, data, schedule, progress)
    if resume and kept is not None:
        run.load(kept, key)
    interrupted = False
    try:
        run.go(lambda: run.keep(kept, key))
    except KeyboardInterrupt:
        interrupted = True
    return run.finish(interrupted)


class _Run:
    """One run's moving parts."""

    def __init__(
        self, loaded: LoadedModel, data: Data, schedule: Schedule, progress: Progress
    ) -> None:
        self.loaded, self.data, self.schedule, self.progress = loaded, data, schedule, progress
        self.parameters = [p for p in loaded.module.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=schedule.rate, betas=(0.9, 0.98), weight_decay=0.0
        )
        self.generator = torch.Generator().manual_seed(schedule.seed)
        self.step = 0
        self.spent = 0.0
        self.best = _Best()
        self.last: Measures | None = None
        self.order: Iterator[list[int]] = iter(())

    def go(self, keep: Callable[[], None]) -> None:
        """All steps that are left."""
        learned = self.data.rows.subset(self.data.learned)
        self.order = learned.shuffled(self.schedule.batch, self.generator)
        for _ in range(self.step):
            next(self.order)
        torch.manual_seed(self.schedule.seed + self.step)
        began, kept = time.monotonic() - self.spent, time.monotonic()
        while self.step < self.schedule.steps:
            loss = self._step([self.data.learned[i] for i in next(self.order)])
            self.step += 1
            self.spent = time.monotonic() - began
            self._look()
            self._tell(loss)
            if time.monotonic() - kept > KEPT_EVERY_S:
                keep()
                kept = time.monotonic()

    def _step(self, chosen: Sequence[int]) -> float:
        if self.step == self.schedule.rounds_from:
            train.quantise(self.loaded.module, self.schedule.bits)
        rate = self.schedule.rate * self.schedule.factor(self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        batch = self.data.rows.batch(chosen)
        found = outputs(self.loaded, batch)[self.data.objective.name].float()
        loss = self.data.objective.loss(found, self.data.teacher(chosen), positions(found, batch))
        if not torch.isfinite(loss):
            raise InputError(
                f"the loss is {float(loss)} after {self.step} steps",
                fix="give a lower --lr, and check that the tuned model's outputs are finite",
            )
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        return loss.item()

    def _look(self) -> None:
        """Measure on the held-out inputs now and then, from the first rounded step on."""
        rounded = self.step - self.schedule.rounds_from
        every = max(1, (self.schedule.steps - self.schedule.rounds_from) // EVALUATIONS)
        if rounded > 0 and (rounded % every == 0 or self.step == self.schedule.steps):
            self.last = self.measure()
            self.best.offer(self.last, self._state())

    def _state(self) -> dict[str, Tensor]:
        return {k: v for k, v in train.attached(self.loaded.module).state_dict().items()}

    def measure(self) -> Measures:
        """The measures on the held-out inputs."""
        return measure(self.loaded, self.data, self.data.held_out)

    def _tell(self, loss: float) -> None:
        detail: dict[str, float | str] = {"loss": loss}
        if self.last is not None:
            detail["agreement"] = self.last.agreement
        self.progress(
            Event(
                stage="distil",
                done=self.step,
                total=self.schedule.steps,
                unit="steps",
                detail=detail,
            )
        )

    def finish(self, interrupted: bool) -> Distilled:
        """Leave the best rounded state attached."""
        module = self.loaded.module
        if self.best.measures is None:  # interrupted before the first rounded step
            train.quantise(module, self.schedule.bits)
            self.best.offer(self.measure(), self._state())
        train.attached(module).load_state_dict(self.best.state)
        assert self.best.measures is not None
        return Distilled(
            held_out=self.best.measures,
            steps=self.step,
            seconds=self.spent,
            interrupted=interrupted,
        )

    def keep(self, path: Path | None, key: str) -> None:
        """Write everything that a later run needs to go on."""
        if path is None:
            return
        stage = path.with_name(path.name + ".tmp")
        torch.save(
            {
                "key": key,
                "step": self.step,
                "spent": self.spent,
                "state": self._state(),
                "optimiser": self.optimiser.state_dict(),
                "best": (self.best.measures, self.best.state),
            },
            stage,
        )
        stage.replace(path)

    def load(self, path: Path, key: str) -> None:
        """Take up a run where `keep` left it.

        Raises:
            InputError: there is none, or it was another run.
        """
        if not path.exists():
            raise InputError(f"{path} does not exist", fix="start without --resume")
        with torch.serialization.safe_globals([Measures]):
            found: dict[str, Any] = torch.load(path, weights_only=True)
        if found["key"] != key:
            raise InputError(
                f"{path} belongs to a run with other models, inputs or options",
                fix="give the same arguments, or start without --resume",
            )
        train.attached(self.loaded.module).load_state_dict(found["state"])
        self.optimiser.load_state_dict(found["optimiser"])
        self.step, self.spent = found["step"], found["spent"]
        self.best.measures, self.best.state = found["best"]


def positions(found: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Where an output (rows, ..., width) counts: everywhere, but at padding."""
    mask = batch.get("attention_mask")
    if mask is not None and found.shape[:-1] == mask.shape:
        return mask
    return torch.ones(found.shape[:-1])


@torch.no_grad()
def measure(loaded: LoadedModel, data: Data, chosen: Sequence[int]) -> Measures:
    """Agreement and divergence with the teacher over some rows, each position weighted equally."""
    module = loaded.module
    training = module.training
    module.eval()
    totals, weight = torch.zeros(2, dtype=torch.float64), 0.0
    subset = data.rows.subset(chosen)
    for part in subset.in_order(EVALUATED):
        rows = [chosen[i] for i in part]
        batch = data.rows.batch(rows)
        found = outputs(loaded, batch)[data.objective.name].float()
        mask = positions(found, batch)
        pair = data.objective.measure(found, data.teacher(rows), mask)
        count = float(mask.sum())
        totals += count * torch.stack(pair).double()
        weight += count
    module.train(training)
    agreement, divergence = (totals / weight).tolist()
    return Measures(agreement=agreement, divergence=divergence)


__all__ = ["Data", "Distilled", "Schedule", "distill", "masked_mean", "measure", "positions"]
