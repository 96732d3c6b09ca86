"""Report the progress of an engine build, and let Ctrl-C end it.

TensorRT calls its `IProgressMonitor` back from C++, where no Python exception may pass. So the
build runs on a second thread, and the main one waits, open to Ctrl-C.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from kilodelta.progress import Event, Progress

T = TypeVar("T")

_POLL_SECONDS = 0.05  # a signal that arrives on another thread does not wake a waiting one


class BuildWatch:
    """Counts the phases of a build, and says when it has to stop."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._done, self._stopped = progress, 0, threading.Event()
        self.failure: BaseException | None = None

    def stop(self) -> None:
        """Make the build end at its next step."""
        self._stopped.set()

    def finished(self, phase: str) -> None:
        """Report a phase; what the callback raises stops the build and is kept as `failure`."""
        self._done += 1
        event = Event(
            stage="engine", done=self._done, total=0, unit="phases", detail={"last": phase}
        )
        try:
            self._progress(event)
        except BaseException as error:  # raised again on the main thread
            self.failure = self.failure or error
            self.stop()

    def goes_on(self) -> bool:
        """Return whether the build may go on."""
        return not self._stopped.is_set()


def monitor(trt: Any, watch: BuildWatch) -> Any:
    """Return an `IProgressMonitor` that reports to a watch."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            pass

        def step_complete(self, phase: str, step: int) -> bool:
            return watch.goes_on()

        def phase_finish(self, phase: str) -> None:
            watch.finished(phase)

    return Monitor()


def attended(work: Callable[[], T], watch: BuildWatch) -> T:
    """Run `work` on another thread and return its result; an interrupt stops it and passes on.

    The end is an event, since a `Thread.join` that an interrupt breaks takes the thread for ended
    from then on, up to Python 3.12.

    Raises:
        BaseException: what `work` or the progress callback raised, or the interrupt.
    """
    results: list[T] = []
    ended = threading.Event()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            watch.failure = watch.failure or error
        finally:
            ended.set()

    try:
        threading.Thread(target=run, name="tensorrt-build", daemon=True).start()
        while not ended.wait(_POLL_SECONDS):
            pass
    except BaseException:
        watch.stop()
        ended.wait()
        raise
    if watch.failure is not None:
        raise watch.failure
    return results[0]
