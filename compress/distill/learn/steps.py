"""Take the steps of one distillation, and keep the best of its rounded states.

A step that memory does not hold is computed in smaller pieces, and a training that goes astray, or
a short one that ends no nearer to the tuned model, begins again at a lower rate.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from kilodelta.compress.distill.learn.data import Data
from kilodelta.compress.distill.learn.gradient.collective import backward_shared
from kilodelta.compress.distill.learn.gradient.loss_scale import SMALLEST, LossScale
from kilodelta.compress.distill.learn.gradient.pieces import backward, is_out_of_memory
from kilodelta.compress.distill.learn.measure import measure
from kilodelta.compress.distill.learn.objective import Measures, mean_of
from kilodelta.compress.distill.learn.order import Order
from kilodelta.compress.distill.learn.outputs import run
from kilodelta.compress.distill.learn.schedule import BestState, Distilled, Look, Schedule
from kilodelta.compress.distill.learn.watch import SHORT, Watch
from kilodelta.compress.training import train
from kilodelta.compress.training.products.narrowing import Narrowed
from kilodelta.errors import InputError
from kilodelta.models import LoadedModel
from kilodelta.progress import Event, Progress

EVALUATIONS = 4
"""Times that the held-out inputs are looked at while the rounded coefficients train."""
LOOKED_AT = 128
"""The most held-out rows of a look, which only chooses among a training's last states. All rows
are measured before the training, and after it on the merged weights."""
KEPT_EVERY_S = 30.0
"""Seconds between two writes of the state from which an interrupted run resumes."""
CLIP = 1.0
"""The largest norm of a step's gradient."""


class Run:
    """One run's moving parts."""

    def __init__(
        self,
        loaded: LoadedModel,
        data: Data,
        schedule: Schedule,
        progress: Progress,
        piece: int | None = None,
    ) -> None:
        self.loaded, self.data, self.schedule, self.progress = loaded, data, schedule, progress
        self.trained = [p for p in loaded.module.parameters() if p.requires_grad]
        # Extras have the base's type. In bfloat16 a step of the usual rate would round to nothing,
        # so the optimiser works on float32 copies. Coefficients are float32 and their own copies.
        self.masters = [
            p if p.dtype == torch.float32 else nn.Parameter(p.detach().float().clone())
            for p in self.trained
        ]
        # One kernel for all parameters: a shared vector comes with a number for each target.
        fused = all(master.device.type in ("cpu", "cuda") for master in self.masters)
        self.optimiser = torch.optim.AdamW(
            self.masters, lr=schedule.rate, betas=(0.9, 0.98), weight_decay=0.0, fused=fused
        )
        self.watch = Watch()
        self.scale = LossScale.for_types(p.dtype for p in loaded.module.parameters())
        # Processes draw and decompose alike, but not to the last bit on every pair of machines.
        data.ranks.copy_first(self.trained)
        data.ranks.copy_first(self.masters)
        self._start = {name: v.clone() for name, v in self._coefficients().items()}
        self.piece = piece or schedule.batch
        """Rows computed at a time; fewer than a batch has where memory ran out."""
        self.step = 0
        self._narrow = Narrowed.of(loaded.module, schedule.products)
        self._order = self._new_order()
        self._rewound = False
        """Whether a step went back to the first one, and is not counted."""
        self.spent = 0.0
        self.best = BestState()
        self.curve: list[Look] = []

    def train(self, stopped: threading.Event, keep: Callable[[], object]) -> None:
        """Take all steps that are left, or those until the run is stopped."""
        began, written = time.monotonic() - self.spent, time.monotonic()
        if math.isnan(self.watch.start):
            self.watch.start = self.data.objective.overall(self._measure()).divergence
        while self.step < self.schedule.steps and not self.data.ranks.any(stopped.is_set()):
            loss = self.take(self._order.next())
            self.step += 0 if self._rewound else 1
            self.spent = time.monotonic() - began
            self._look()
            self._tell(loss)
            self._judge()
            self._rewound = False
            if time.monotonic() - written > KEPT_EVERY_S:
                keep()
                written = time.monotonic()
        if self.step < self.schedule.steps or stopped.is_set():
            keep()

    def _new_order(self) -> Order:
        """Return the order of the whole run's batches."""
        data, schedule = self.data, self.schedule
        return Order(data.rows, data.learned, schedule.batch, schedule.seed, data.ranks)

    def take(self, chosen: Sequence[int]) -> float:
        """Take one step on some rows, without counting it; return its loss."""
        if self.step == self.schedule.rounds_from:
            train.quantise(self.loaded.module, self.schedule.bits)
        for group in self.optimiser.param_groups:
            group["lr"] = self.schedule.rate * self.watch.share * self.schedule.factor(self.step)
        self._turn()
        loss = self._gradient(chosen)
        if (
            self.watch.is_astray(loss.item())
            and self._leads_away(loss.item())
            and self._begins_again(loss.item())
        ):
            return loss.item()
        for parameter, master in zip(self.trained, self.masters, strict=True):
            if master is not parameter and parameter.grad is not None:
                master.grad = parameter.grad.float()
        if not self.scale.accepts([m.grad for m in self.masters if m.grad is not None]):
            self._leave_out()
            return loss.item()
        nn.utils.clip_grad_norm_(self.masters, CLIP)
        self.optimiser.step()
        with torch.no_grad():
            for parameter, master in zip(self.trained, self.masters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)
        return loss.item()

    def _turn(self) -> None:
        """Compute this step in the next of the ways that the delta trains for."""
        ways = train.attached(self.loaded.module).ways
        if ways.all:
            ways.take(ways.at(self.step))

    def _leads_away(self, loss: float) -> bool:
        """Ask the held-out rows whether a training whose loss grew leads away from the teacher.

        The first loss is one batch's, and another batch's may be ten times as large at any rate.
        """
        if not math.isfinite(loss):
            return True
        if self.watch.has_harmed(self.data.objective.overall(self._measure()).divergence):
            return True
        self.watch.was_wrong()
        return False

    def _leave_out(self) -> None:
        """Leave out a step whose scaled gradient overflowed.

        Raises:
            InputError: at the smallest scale, the gradient itself is not finite.
        """
        if self.scale.scale == SMALLEST:
            raise InputError(
                f"the gradient is not finite in float16 after {self.step} steps",
                fix="give --dtype bf16 or fp32",
            )

    @property
    def _share(self) -> int:
        """The most rows of a batch that this process computes."""
        return -(-self.schedule.batch // self.data.ranks.count)

    def _judge(self) -> None:
        """At the end of a short training that brought nothing, begin again where that is allowed.

        The best state of all attempts is kept, so that a later one cannot make it worse.
        """
        done = self.step == self.schedule.steps < SHORT
        if done and self.watch.has_harmed(self.best.divergence) and self.watch.begin_again():
            self._go_back()

    def _begins_again(self, loss: float) -> bool:
        """Go back to where the training began, at a lower rate, where one is left.

        After the last attempt a training whose loss is finite goes on, for the best state is kept:
        where the first coefficients are nearly the tuned model, every rate leads away from them.

        Raises:
            InputError: the loss is not finite at any rate.
        """
        # Without an update the loss is the base's: no lower rate makes that one finite.
        hopeless = self.watch.seen == 0 and not math.isfinite(loss)
        if hopeless and self.step == 0:  # the tuned model's outputs are known to be finite
            raise InputError(
                f"the loss is {loss} before the first step: the base's own outputs are not finite",
                fix="check the base's weights; after --dtype fp16 or bf16, try fp32",
            )
        if not hopeless and self.watch.begin_again():
            self._go_back()
            return True
        if math.isfinite(loss):
            self.watch.was_wrong()
            return False
        raise InputError(
            f"the loss is {loss} after {self.step} steps",
            fix="give a lower --lr, and check that the tuned model's outputs are finite",
        )

    def _go_back(self) -> None:
        """Restore the first coefficients; a short training takes all its steps anew."""
        kept: dict[str, Tensor] = {}
        if self.schedule.steps < SHORT:
            self.step, self._rewound, self._order = 0, True, self._new_order()
            self.curve.clear()
        else:  # the steps go on being counted, with rounding where it has begun
            now = self._coefficients()
            kept = {name: value for name, value in now.items() if name.endswith("rounding")}
        self.loaded.module.load_state_dict({**self._start, **kept})
        with torch.no_grad():
            for parameter, master in zip(self.trained, self.masters, strict=True):
                if master is not parameter:
                    master.copy_(parameter)
        self.optimiser.state.clear()

    def _gradient(self, chosen: Sequence[int]) -> Tensor:
        """Compute the gradient of some rows; return their loss.

        Where memory runs out, the rows are computed in pieces of half as many, now and from then
        on, until a single row does not fit.
        """
        batch, wanted = self.data.rows.batch(chosen), self.data.teacher(chosen)
        mask = self.data.rows.mask(chosen)

        def compute(rows: slice) -> dict[str, Tensor]:
            part = {name: values[rows] for name, values in batch.items()}
            return run(self.loaded, part, one_row=self.data.survey.one_row)

        def loss_of(outputs: Mapping[str, Tensor]) -> Tensor:
            # One generator per step: what a resumed run draws does not depend on where it began.
            seed = (self.schedule.seed * 1_000_003 + self.step) % 2**63
            draws = torch.Generator().manual_seed(seed)
            loss = self.data.objective.loss(outputs, wanted, mask, draws)
            self._note(chosen, outputs, wanted, mask)
            return loss * self.scale.scale if self.scale.active else loss

        ranks, count = self.data.ranks, len(chosen)
        is_shared = 1 < ranks.count <= count
        while True:
            self.loaded.module.zero_grad()
            try:
                with self._narrow.used() if self._narrow else nullcontext():
                    if is_shared:
                        loss = backward_shared(
                            ranks, compute, loss_of, count, self.trained, self.piece
                        )
                    else:
                        loss = backward(compute, loss_of, count, self.piece)
                return loss / self.scale.scale
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(min(self.piece, -(-count // ranks.count) if is_shared else count))

    @torch.no_grad()
    def _note(
        self,
        chosen: Sequence[int],
        outputs: Mapping[str, Tensor],
        wanted: Mapping[str, Tensor],
        mask: Tensor | None,
    ) -> None:
        """Let the order of later batches know each row's divergence."""
        divergences = self.data.objective.row_divergences(outputs, wanted, mask)
        if divergences is not None:
            self._order.note(chosen, divergences)

    def _halve(self, piece: int) -> None:
        """Compute half as many rows at a time from now on."""
        if piece == 1:
            raise InputError(
                "memory ran out on a single input",
                fix="give a smaller --max-length, --dtype bf16, or a device with more memory",
            )
        self.piece = piece // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _look(self) -> None:
        """Measure on the held-out rows now and then, from the first rounded step on."""
        rounded = self.step - self.schedule.rounds_from
        every = max(1, (self.schedule.steps - self.schedule.rounds_from) // EVALUATIONS)
        if rounded > 0 and (rounded % every == 0 or self.step == self.schedule.steps):
            self._offer()

    def _offer(self) -> None:
        measures = self._measure()
        overall = self.data.objective.overall(measures)
        self.curve.append(Look(step=self.step, **asdict(overall)))
        self.best.offer(overall.divergence, measures, self._coefficients())

    def _measure(self) -> tuple[Measures, ...]:
        """Measure on some held-out rows; the mean over all ways, where there are several."""
        ways = train.attached(self.loaded.module).ways
        each = []
        for way in ways.all or (None,):
            ways.take(way)
            # Rows are held out in a random order, so the first of them are a sample.
            each.append(measure(self.loaded, self.data, self.data.held_out[:LOOKED_AT]))
        ways.take(None)
        return tuple(mean_of(outputs) for outputs in zip(*each, strict=True))

    def _coefficients(self) -> dict[str, Tensor]:
        """Return the attachment's tensors and the extras', which train along."""
        return dict(self.loaded.module.state_dict())

    def _tell(self, loss: float) -> None:
        detail: dict[str, float | str] = {"loss": loss}
        if self.curve:
            detail["agreement"] = self.curve[-1].agreement
        total = self.schedule.steps
        event = Event(stage="distil", done=self.step, total=total, unit="steps", detail=detail)
        self.progress(event)

    def finish(self) -> Distilled:
        """Leave the best rounded state attached."""
        stopped = self.step < self.schedule.steps
        # Interrupted before the first rounded step, at least of the attempt that may help.
        short = self.schedule.steps < SHORT
        if not self.best.state or (
            stopped and short and self.watch.has_harmed(self.best.divergence)
        ):
            train.quantise(self.loaded.module, self.schedule.bits)
            self._offer()
        self.loaded.module.load_state_dict(self.best.state)
        train.attached(self.loaded.module).ways.take(None)
        return Distilled(
            measures=self.best.measures,
            curve=tuple(self.curve),
            steps=self.step,
            seconds=self.spent,
            interrupted=stopped,
            piece=self.piece if self.piece < self._share else 0,
            again=self.watch.again,
        )

    def state(self) -> dict[str, Any]:
        """Return everything that a later run needs to go on, as tensors and numbers."""
        pairs = [[one.agreement, one.divergence] for one in self.best.measures]
        return {
            "step": self.step,
            "spent": self.spent,
            "state": self._coefficients(),
            "optimiser": self.optimiser.state_dict(),
            "watch": self.watch.state(),
            "scale": self.scale.state(),
            "masters": [m.detach() for m in self.masters],
            "order": self._order.state(),
            "best": self.best.state,
            "measures": {"divergence": self.best.divergence, "each": pairs},
            "curve": [asdict(look) for look in self.curve],
        }

    def restore(self, found: Mapping[str, Any]) -> None:
        """Take up a run where `state` left it."""
        self.loaded.module.load_state_dict(found["state"])
        self.optimiser.load_state_dict(found["optimiser"])
        with torch.no_grad():
            for master, values in zip(self.masters, found["masters"], strict=True):
                master.copy_(values)
        self.watch = Watch.of(found["watch"])
        self.scale = LossScale.of(found["scale"]) if "scale" in found else self.scale
        self.step, self.spent = found["step"], found["spent"]
        self._order.restore(found["order"])
        each = tuple(Measures(agreement=a, divergence=d) for a, d in found["measures"]["each"])
        self.best = BestState(found["measures"]["divergence"], each, found["best"])
        self.curve = [Look(**look) for look in found["curve"]]
