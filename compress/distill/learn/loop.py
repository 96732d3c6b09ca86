"""Distil: train a delta's coefficients until the model computes what the tuned one does.

No labels: the tuned model's outputs on the inputs are the target. The last part of the steps runs
with the numbers that the file will hold, and the best of these states on rows held out is kept
(`steps.py`). Here a run begins, or goes on, and ends when its steps are taken or at Ctrl-C.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kilodelta.compress.distill.learn import state as states
from kilodelta.compress.distill.learn.data import Data
from kilodelta.compress.distill.learn.schedule import Distilled, Schedule
from kilodelta.compress.distill.learn.steps import Run
from kilodelta.compress.distill.processes.ranks import Ranks
from kilodelta.models import LoadedModel
from kilodelta.progress import Progress


def distill(
    loaded: LoadedModel,
    data: Data,
    schedule: Schedule,
    progress: Progress,
    *,
    kept: Path | None = None,
    facts: states.Facts | None = None,
    resume: bool = False,
    piece: int | None = None,
) -> Distilled:
    """Train the delta that is attached to `loaded.module`, and leave its best rounded state there.

    Ctrl-C ends the run after the step that it falls into, and its state is written; a second one
    ends it at once. So does a signal that the caller lets interrupt the program (SIGTERM and SIGHUP
    at the command line), but the interruption then goes on. A resumed run ends where one without a
    pause would have, bit for bit.

    Args:
        loaded: the student, its delta attached.
        data: what it learns from.
        schedule: how long and how fast.
        progress: told about every step.
        kept: where the state of the run is written every half minute and when it is interrupted,
            and read on `resume`.
        facts: what must be equal for a run to be resumed.
        resume: go on where the state in `kept` ended.
        piece: rows whose activations memory holds at once; all of a batch by default.

    Raises:
        InputError: the run to resume was another one, or the loss is not finite.
        OutputError: the state cannot be written.
    """
    job = Run(loaded, data, schedule, progress, piece)
    if resume and kept is not None:
        found = states.load(kept, facts or {})
        with states.explained(kept):
            job.restore(found)

    def keep() -> None:
        if kept is not None and data.ranks.writes:
            states.save(kept, facts or {}, job.state())

    with _stop_after_step(_signals(data.ranks)) as stopped:
        job.train(stopped, keep)
    return job.finish()


def _signals(ranks: Ranks) -> tuple[str, ...]:
    """Name the signals that wait for a step to end.

    torchrun sends SIGTERM where one of several processes has ended: then the others' step will not.
    """
    return ("SIGINT",) if ranks.count > 1 else ("SIGINT", "SIGTERM", "SIGHUP")


@contextmanager
def _stop_after_step(names: Sequence[str]) -> Iterator[threading.Event]:
    """Let the first of some signals set an event; a second one interrupts as it always does.

    A step that is cut in two leaves coefficients of two steps beside each other. Outside the main
    thread no signal arrives, and none can be caught. After the block a signal other than Ctrl-C's
    does what it would have done at once.
    """
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before: dict[int, Any] = {}
    heard: list[int] = []

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, frame: Any) -> None:
        heard.append(number)
        stopped.set()
        restore()

    for name in names:
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        # Ignored: in the background, where Ctrl-C means someone else. By default: the end at once.
        if number is not None and callable(signal.getsignal(number)):
            before[number] = signal.signal(number, stop)
    try:
        yield stopped
    finally:
        restore()
    if heard and heard[0] != signal.SIGINT:
        signal.raise_signal(heard[0])
