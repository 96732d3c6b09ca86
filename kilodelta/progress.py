"""How long work tells its caller where it stands: one callback, no printing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import Lock


@dataclass(frozen=True, kw_only=True)
class Event:
    """One step of a stage: `done` of `total` units (`total` 0 where it is not known)."""

    stage: str
    done: int
    total: int
    unit: str
    detail: Mapping[str, float | str] = field(default_factory=dict)


Progress = Callable[[Event], None]


def silent(event: Event) -> None:
    """Report to nobody: the default."""


class StoppedError(Exception):
    """Work has to stop; raised inside its threads, never seen by a caller."""


class Meter:
    """Adds up the work of several threads, reports it, and can tell all of them to stop."""

    def __init__(self, stage: str, total: int, unit: str, progress: Progress) -> None:
        self._stage, self._total, self._unit, self._progress = stage, total, unit, progress
        self._done = 0
        self._tensors = (0, 0)
        self._lock = Lock()
        self._stopped = False

    def expect(self, tensors: int) -> None:
        """Say how many tensors there are."""
        self._tensors = (0, tensors)

    def finish(self) -> None:
        """Report one more tensor as done.

        Raises:
            StoppedError: `stop` was called.
        """
        with self._lock:
            self._tensors = (self._tensors[0] + 1, self._tensors[1])
        self.add(0)

    def add(self, count: int) -> None:
        """Report `count` more units.

        Raises:
            StoppedError: `stop` was called.
        """
        with self._lock:
            if self._stopped:
                raise StoppedError
            self._done += count
            done, total = self._tensors
            event = Event(
                stage=self._stage,
                done=self._done,
                total=self._total,
                unit=self._unit,
                detail={"tensors": f"{done}/{total}"} if total else {},
            )
            self._progress(event)

    def stop(self) -> None:
        """Make every later `add` raise."""
        self._stopped = True
