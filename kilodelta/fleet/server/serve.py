"""What runs in the processes that `start.py` starts: a server that forks, and a child.

A fork server of its own, because `multiprocessing`'s takes a child of it through some 5 ms of
processor time before and after its work, as much as the fork: a tenth of the time of a small task.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import select
import signal
import socket
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from kilodelta.fleet.gpus import VISIBLE

COLLECT = (20_000, 20, 100)
"""Thresholds of a child's garbage collector. Loading torch and tracing a model make millions of
objects that stay; Python's own thresholds, (700, 10, 10), look through them 1,500 times, which was
a tenth of an export's time, and others wait for the export of their base."""
YIELDS = 10
"""Added to the niceness of light tasks beside few that load libraries, for which others wait: the
one export of a base would share its core with them, and be alone at the end."""


def serve(control: int, modules: Sequence[str]) -> None:
    """Import modules, then fork a child for each request until the parent hangs up.

    A request is one byte with two descriptors: the child's end of its pipe, and the end of a pipe
    for the server's own words on this child, its process number and, when it has ended, its exit
    code, each on a line.

    Args:
        control: descriptor of a UNIX socket.
        modules: what children need; one that cannot be imported is the business of the child.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it by its parent alone
    for name in modules:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    wake, waker = os.pipe()
    for end in (wake, waker):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    told: dict[int, int] = {}  # by process number, where to say that it has ended
    with socket.socket(fileno=control) as requests:
        while True:
            ready, _, _ = select.select([control, wake], [], [])
            if wake in ready:
                os.read(wake, 4096)
                _tell_ended(told)
            if control in ready:
                asked, ends, _, _ = socket.recv_fds(requests, 1, 2)
                if not asked:
                    return
                pipe, words = ends
                process = os.fork()
                if process == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for end in (*told.values(), words, wake, waker, control):
                        os.close(end)
                    run(pipe)
                told[process] = words
                os.close(pipe)
                _say(words, process)


def _tell_ended(told: dict[int, int]) -> None:
    """Say of every child that has ended with which exit code; below 0 by a signal."""
    while True:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if process == 0:
            return
        words = told.pop(process)
        _say(words, os.waitstatus_to_exitcode(status))
        os.close(words)


def _say(words: int, number: int) -> None:
    """Write one line; a parent that has hung up does not want it."""
    with contextlib.suppress(OSError):
        os.write(words, b"%d\n" % number)


def run(pipe: int) -> None:
    """Wait for a task, do it, answer, and end this process.

    Args:
        pipe: descriptor; gives the function that does the task, the fleet's folder and the task,
            and takes None when the result is computed, then the answer.
    """
    code = 1
    try:
        _run(Connection(pipe))
        code = 0
    finally:
        # All files are closed and named. What an interpreter does at its end takes torch a second.
        os._exit(code)


def _run(pipe: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it by its parent alone
    # Libraries' talk would break into the parent's progress.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    gc.enable()  # the server does not collect: `loading.py`
    gc.set_threshold(*COLLECT)
    try:
        do, out, task = pipe.recv()
    except (EOFError, OSError):  # no task was left, or the parent has ended
        return
    if task["yields"]:
        os.nice(YIELDS)
    if task.get("gpu") is not None:  # before the first call of CUDA, which reads it
        os.environ[VISIBLE] = task["gpu"]
    # None says that the result is computed.
    pipe.send(do(task, Path(out), lambda: pipe.send(None)))
