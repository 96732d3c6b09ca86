"""Start processes for tasks: forked from a server that has loaded their libraries, or anew.

The other side is `serve.py`. Neither imports the parent's script, unlike `multiprocessing`,
so a script that runs a fleet needs no guard.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from typing import Protocol

LOST = 255
"""Exit code of a child whose server ended before it could say another one."""


class Process(Protocol):
    """A process that waits for a task at the other end of a pipe."""

    @property
    def pid(self) -> int:
        """Its process number."""

    def exit_code(self, *, patient: bool) -> int | None:
        """Return how it has ended, below 0 by a signal; None while it runs, unless `patient`."""

    def terminate(self) -> None:
        """Ask it to end."""


def start_anew() -> tuple[Connection, Process]:
    """Start a process that loads its libraries itself; return the pipe to it, and the process."""
    ours, theirs = socket.socketpair()
    with theirs:
        started = _python("run", theirs.fileno(), "")
    return Connection(ours.detach()), _Started(started)


class Server:
    """A process that loads libraries once, and forks children.

    Args:
        modules: what it imports, in order.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        self._modules = list(modules)
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, without waiting until it has loaded."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = _python("serve", theirs.fileno(), f", {self._modules!r}")
        self._control = ours

    def fork(self) -> tuple[Connection, Process]:
        """Fork a child; return the pipe to it, and the child. Not to be called by two threads.

        A server that was killed is started again.
        """
        ours, theirs = socket.socketpair()
        words, their_words = os.pipe()
        try:
            ends = [theirs.fileno(), their_words]
            try:
                self._ask(ends)
            except OSError:
                self.close()
                self._ask(ends)
        finally:
            theirs.close()
            os.close(their_words)
        return Connection(ours.detach()), _Forked(words)

    def _ask(self, ends: list[int]) -> None:
        if self._control is None:
            self.start()
        assert self._control is not None
        socket.send_fds(self._control, [b"f"], ends)

    def close(self) -> None:
        """Hang up, and wait for the server's end; children that work go on."""
        if self._control is not None and self._process is not None:
            with contextlib.suppress(OSError):  # it has ended
                # Also where a fork of this process, by other threads of it, holds the socket.
                self._control.shutdown(socket.SHUT_RDWR)
            self._control.close()
            self._process.wait()
        self._control = self._process = None


def _python(function: str, end: int, more: str) -> subprocess.Popen[bytes]:
    """Call a function of `serve.py` with a descriptor, in an interpreter like this one."""
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; "
        f"from kilodelta.fleet.server import serve; serve.{function}({end}{more})"
    )
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    command = [sys.executable, *flags, "-c", code]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[end])


class _Started:
    """A process of this one."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_code(self, *, patient: bool) -> int | None:
        return self._process.wait() if patient else self._process.poll()

    def terminate(self) -> None:
        self._process.terminate()


class _Forked:
    """A process of the server, which says its number and, in the end, its exit code."""

    def __init__(self, words: int) -> None:
        self._words, self._said = words, b""
        self._code: int | None = None

    @property
    def pid(self) -> int:
        """Its process number; 0 where the server has ended before it said so."""
        while self._code is None and b"\n" not in self._said:
            self._listen()
        return int(self._said.partition(b"\n")[0] or 0)

    def exit_code(self, *, patient: bool) -> int | None:
        while self._code is None and (patient or wait([self._words], 0)):
            self._listen()
        return self._code

    def terminate(self) -> None:
        if self.exit_code(patient=False) is None and self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    def _listen(self) -> None:
        """Take over what the server has said; its silence for ever is an end as well."""
        said = os.read(self._words, 64)
        self._said += said
        if self._said.count(b"\n") == 2:
            self._code = int(self._said.split()[1])
        elif not said:
            self._code = LOST
        if self._code is not None:
            os.close(self._words)
