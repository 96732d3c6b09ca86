"""Distil: train a delta's coefficients until the model computes what the tuned one does.

No labels: the tuned model's outputs on the inputs are the target. The last part of the steps runs
with the numbers that the file will hold, and the best of these states on rows held out is kept
(`steps.py`). Here a run begins, or goes on, and ends when its steps are taken or at Ctrl-C.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kilodelta.compress.distill.learn import state as states
from kilodelta.compress.distill.learn.data import Data
from kilodelta.compress.distill.learn.schedule import Distilled, Schedule
from kilodelta.compress.distill.learn.steps import Run
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
    ends it at once. A resumed run ends where one without a pause would have, bit for bit.

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

    with _stop_after_step() as stopped:
        job.train(stopped, keep)
    return job.finish()


@contextmanager
def _stop_after_step() -> Iterator[threading.Event]:
    """Let the first Ctrl-C set an event; a second one interrupts as it always does.

    A step that is cut in two leaves coefficients of two steps beside each other. Outside the main
    thread no signal arrives, and none can be caught.
    """
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = signal.getsignal(signal.SIGINT)

    def stop(number: int, frame: Any) -> None:
        stopped.set()
        signal.signal(signal.SIGINT, before)

    if before in (signal.SIG_IGN, None):  # in the background, where Ctrl-C means someone else
        yield stopped
        return
    signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
