"""Whatever happens to an apply, the device serves the old fine-tune or the new one.

Every call that changes the disk is made to fail once, and processes are killed at random moments.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kilodelta.device import apply, rollback
from kilodelta.device.folder.journal import Journal
from kilodelta.errors import OutputError
from tests.support.devices import Bench


@pytest.fixture
def serving(bench: Bench) -> Bench:
    """A device that serves `a` and is about to serve `b`."""
    apply(bench.device, bench.files["a"])
    return bench


CALLS = ((os, "write"), (os, "pwrite"), (os, "fsync"), (os, "replace"), (os, "mkdir"),
         (os, "truncate"), (shutil, "copyfile"), (np, "save"))  # fmt: skip


class Saboteur:
    """Counts the calls that change the disk, and lets the one numbered `fail` find it full.

    With `dead` every later one fails too, as for a process that was killed: nothing is undone.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail: int, *, dead: bool) -> None:
        self.count, self.fail, self.dead = 0, fail, dead
        for place, name in CALLS:
            monkeypatch.setattr(place, name, self._wrapped(getattr(place, name)))
        monkeypatch.setattr(
            io, "open", self._wrapped(io.open, lambda _, mode="r", *a: mode[0] in "wax")
        )
        monkeypatch.setattr(
            os, "open", self._wrapped(os.open, lambda _, flags, *a: flags & os.O_CREAT)
        )
        monkeypatch.setattr(Path, "unlink", self._last_word(Path.unlink))
        monkeypatch.setattr(shutil, "rmtree", self._last_word(shutil.rmtree))

    def _wrapped(
        self, real: Callable[..., Any], counts: Callable[..., Any] = lambda *a: True
    ) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if not counts(*args):
                return real(*args, **options)
            self.count += 1
            if self.count == self.fail or (self.dead and self.count > self.fail):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **options)

        return call

    def _last_word(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """The dead remove nothing."""

        def call(*args: Any, **options: Any) -> Any:
            if not (self.dead and self.count >= self.fail):
                real(*args, **options)

        return call


@pytest.mark.parametrize("dead", [False, True], ids=["full disk", "killed"])
def test_every_step_may_fail(serving: Bench, monkeypatch: pytest.MonkeyPatch, dead: bool) -> None:
    seen = set()
    for fail in range(1, 200):
        with monkeypatch.context() as patch:
            saboteur = Saboteur(patch, fail, dead=dead)
            with contextlib.suppress(OutputError):  # nothing else comes of a full disk
                apply(serving.device, serving.files["b"])
        seen.add(serving.serves(check=True))
        if saboteur.count < fail:
            break
        if not dead and serving.serves(check=True) == "a":
            assert serving.is_clean(), f"call {fail}"
        _reset(serving)
    assert seen == {"a", "b"}
    assert fail > 25, "the calls were counted"


def _reset(serving: Bench) -> None:
    """Serve `a` again, by the next command's own recovery."""
    apply(serving.device, serving.files["a"])
    assert serving.serves(check=True) == "a"
    assert len(list((serving.device / "deltas").iterdir())) <= 2 + 1


def test_every_step_of_a_rollback_may_fail(serving: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    for fail in range(1, 50):
        apply(serving.device, serving.files["b"])
        with monkeypatch.context() as patch, contextlib.suppress(OutputError):
            saboteur = Saboteur(patch, fail, dead=True)
            rollback(serving.device)
        seen.add(serving.serves(check=True))
        if saboteur.count < fail:
            break
        _reset(serving)
    assert seen == {"a", "b"}
    assert fail > 5, "the calls were counted"


def _apply_for_ever(serving: Bench) -> int:
    """A child that applies two files in turn until it is killed; returns its process id."""
    child = os.fork()
    if child:
        return child
    try:
        for file in itertools.cycle((serving.files["b"], serving.files["a"])):
            apply(serving.device, file)
    finally:
        os._exit(1)


def kills(serving: Bench, count: int) -> Iterator[str]:
    """What is served after each of many kills, the folder used on as it is."""
    chance, began = random.Random(7), time.monotonic()
    apply(serving.device, serving.files["b"])
    apply(serving.device, serving.files["a"])
    longest = 2.0 * (time.monotonic() - began)
    for _ in range(count):
        child = _apply_for_ever(serving)
        time.sleep(chance.uniform(0.0, longest))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "the child died by itself"
        yield serving.serves(check=True)


def test_killed_at_random_moments(serving: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_PAUSE", "0.002")
    seen = []
    for served in kills(serving, 100):  # 20, and more where a busy machine killed none in time
        seen.append(served)
        if len(seen) >= 20 and set(seen) == {"a", "b"}:
            break
    assert set(seen) == {"a", "b"}
    events = [entry["event"] for entry in Journal(serving.device / "journal").entries()]
    assert "recovered" in events, "no kill fell into an apply"
    apply(serving.device, serving.files["b"])
    assert serving.serves(check=True) == "b"


@pytest.mark.slow
def test_two_hundred_kills(serving: Bench) -> None:
    assert set(kills(serving, 200)) == {"a", "b"}
