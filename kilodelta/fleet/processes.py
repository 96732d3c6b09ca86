"""Give each task a process of its own, and have the next process ready before it is needed.

Children are forked from one server process that has loaded what most of them need, so a task of
milliseconds does not wait seconds for libraries. While a child works, the next one is forked and
waits; the next task begins when one has computed its result and waits for the disk; and nobody
waits for the end of a child that has answered. So the processors are not idle meanwhile.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from kilodelta.fleet import child
from kilodelta.fleet.gpus import gpus_for
from kilodelta.fleet.server.start import Process, Server, start_anew
from kilodelta.fleet.task import LIBRARIES, Task
from kilodelta.fleet.work import preload

RETRIES = 1
"""How often a task whose process was killed is tried again; an error is never tried again."""
MANY = 30
"""Children from which on joining the server's memory into huge pages, a tenth of a second, pays."""
WAIT = 0.2
"""Seconds after which a thread that waits for an answer sees whether the run was stopped."""


class Children:
    """Starts processes for tasks; a block, at whose end all of them have ended.

    Args:
        tasks: to run.
        out: the fleet's output folder.
        workers: tasks at once.
    """

    def __init__(self, tasks: Sequence[Task], out: Path, workers: int) -> None:
        self._out = str(out)
        self._alone = kinds_alone(tasks, workers)
        kinds = {task.kind for task in tasks} - self._alone
        self._to_fork = sum(task.kind not in self._alone for task in tasks)
        self._server = Server(modules_to_load(kinds, self._to_fork))
        self._threads = child.thread_environment(max(1, (os.cpu_count() or 1) // workers))
        gpus = gpus_for(tasks)
        self._gpus = queue.SimpleQueue[str]()
        for number in range(workers if gpus else 0):
            self._gpus.put(gpus[number % len(gpus)])
        self._slots = threading.Semaphore(workers)
        self._lock, self._forking = threading.Lock(), threading.Lock()
        self._ready: list[_Child] = []
        self._ending: list[_Child] = []

    def __enter__(self) -> Children:
        # The server, and each child that is started anew, has its threads fixed from the start.
        self._before = {name: os.environ.get(name) for name in self._threads}
        os.environ.update(self._threads)
        if self._to_fork:
            self._server.start()  # it loads while the first export is started
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._ready:
            one.close()
        for one in (*self._ready, *self._ending):
            one.process.exit_code(patient=True)
        self._server.close()
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    def do(self, task: Task, stop: threading.Event) -> Mapping[str, Any]:
        """Run a task in a child that sees one GPU at most; a killed child is tried again.

        As many tasks as there are workers compute at once; others may wait for the disk meanwhile.

        Args:
            task: whose needs are done.
            stop: ends the child when it is set.
        """
        slot = _Slot(self._slots)
        with slot:
            gpu = None if self._gpus.empty() else self._gpus.get()
            given = {**task.to_json(), "gpu": gpu}
            # What torch and a GPU have taken is free at the process's end only.
            is_light = gpu is None and task.kind not in LIBRARIES
            given["yields"] = is_light and bool(self._alone)
            try:
                for _ in range(RETRIES + 1):
                    slot.take()
                    one = self._given(task, given)
                    answer = one.answer(stop, slot.leave if is_light else _nothing)
                    self._leave_to_end(one, wait=gpu is not None)
                    if answer is not None:
                        return answer
                    if stop.is_set():
                        break
                return _killed(task, one.process.exit_code(patient=True) or 0)
            finally:
                if gpu is not None:
                    self._gpus.put(gpu)

    def _leave_to_end(self, one: _Child, *, wait: bool) -> None:
        """Forget a child that has answered once it has ended, or wait for that."""
        one.process.exit_code(patient=wait)
        with self._lock:
            both = (*self._ending, one)
            self._ending = [o for o in both if o.process.exit_code(patient=False) is None]

    def _given(self, task: Task, given: Mapping[str, Any]) -> _Child:
        """Give a task to a child, and have another one forked for the next task."""
        if task.kind in self._alone:
            one = _Child(start_anew(), self._out)
            one.give(given)
            return one
        with self._lock:
            waiting = self._ready.pop() if self._ready else None
            self._to_fork -= 1
            more = self._to_fork > len(self._ready)
        if waiting is not None and waiting.give(given):
            one = waiting
        else:  # there was none, or it was killed while it waited
            one = self._forked()
            one.give(given)
        if more:
            ready = self._forked()
            with self._lock:
                self._ready.append(ready)
        return one

    def _forked(self) -> _Child:
        with self._forking:
            return _Child(self._server.fork(), self._out)


class _Slot:
    """One of the tasks that compute at once: taken before a task begins, left once or never."""

    def __init__(self, slots: threading.Semaphore) -> None:
        self._slots, self._held = slots, False

    def take(self) -> None:
        """Wait for a slot, unless it is held."""
        if not self._held:
            self._slots.acquire()
            self._held = True

    def leave(self) -> None:
        """Let another task compute."""
        if self._held:
            self._held = False
            self._slots.release()

    def __enter__(self) -> None:
        self.take()

    def __exit__(self, *_: object) -> None:
        self.leave()


def _nothing() -> None:
    """Keep the slot."""


class _Child:
    """A process that waits for one task, answers and ends.

    Args:
        started: the pipe to it, and the process.
        out: the fleet's output folder.
    """

    def __init__(self, started: tuple[Connection, Process], out: str) -> None:
        self._ours, self.process = started
        self._out = out

    def give(self, task: Mapping[str, Any]) -> bool:
        """Hand over the task; return whether the child was alive to take it."""
        try:
            self._ours.send((child.do, self._out, task))
        except OSError:
            self.close()
            return False
        return True

    def answer(
        self, stop: threading.Event, computed: Callable[[], None]
    ) -> Mapping[str, Any] | None:
        """Wait for the answer; None where the process was killed, or is now, for `stop` is set.

        Args:
            stop: ends the process when it is set.
            computed: called when the task has only to put its result on the disk.
        """
        answer: Mapping[str, Any] | None = None
        while not stop.is_set():
            if self._ours.poll(WAIT):
                try:
                    answer = self._ours.recv()
                except (EOFError, OSError):
                    break
                if answer is not None:
                    break
                computed()
        else:
            self.process.terminate()
        if answer is None:
            self.process.exit_code(patient=True)
        self.close()
        return answer

    def close(self) -> None:
        """Hang up, which ends a child that waits."""
        self._ours.close()


def modules_to_load(kinds: set[str], children: int) -> list[str]:
    """Return what the server process imports, in order, before the first child is forked.

    A child finds its function in `child`; what follows the libraries keeps what all have loaded
    where children share it.

    Args:
        kinds: of the tasks that children will do.
        children: how many will be forked.
    """
    server = "kilodelta.fleet.server"
    first = [f"{server}.loading", *([] if kinds & LIBRARIES else [f"{server}.lean"])]
    last = [f"{server}.warm", *([f"{server}.joined"] if children >= MANY else [])]
    return [*first, child.__name__, *preload(kinds), *last]


def kinds_alone(tasks: Sequence[Task], workers: int) -> frozenset[str]:
    """Return the kinds whose libraries are not worth loading for all children.

    A process that holds torch takes several times as long to fork. Where few tasks need it, such
    as the one export that all fine-tunes share, they load it themselves while others work.

    Args:
        tasks: to run.
        workers: tasks at once.
    """
    heavy = [task.kind for task in tasks if task.kind in LIBRARIES]
    return frozenset(heavy) if len(heavy) <= workers < len(tasks) else frozenset()


def _killed(task: Task, code: int) -> dict[str, Any]:
    """Say how a child ended that has sent no answer: below 0 by a signal, else by itself."""
    if code == -signal.SIGKILL:  # what the kernel sends where memory is short
        fix = "give it more memory (--jobs 1), then run the fleet again"
    else:
        fix = "run the fleet again with --jobs 1; if it ends so once more, report it"
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return {
        "id": task.id,
        "name": task.name,
        "status": "failed",
        "error": f"its process ended by {how} without an answer",
        "fix": fix,
        "exit_code": 1,
        "seconds": 0.0,
    }
