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

from kilodelta.device import Device, apply, modes, rollback, status
from kilodelta.device.folder import journal
from kilodelta.device.folder.journal import Journal
from kilodelta.errors import OutputError
from tests.doubles import numpy_device
from tests.doubles.numpy_device import BATCH


@pytest.fixture(autouse=True)
def _standin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(modes.OPENERS, "patch", numpy_device.StandIn)


class Bench:
    """A device that serves `a` and is about to serve `b`."""

    def __init__(self, root: Path) -> None:
        base = numpy_device.base(root / "base.safetensors")
        self.device = numpy_device.folder(root / "device", base)
        self.a, self.b = root / "a.kd", root / "b.kd"
        for file, seed in ((self.a, 1), (self.b, 2)):
            numpy_device.delta(base, seed).save(file)
        device = Device(self.device)
        self.known = {
            name: device.run(BATCH, file)["y"].tobytes()
            for name, file in (("base", "base"), ("a", self.a), ("b", self.b))
        }
        apply(self.device, self.a)

    def serves(self) -> str:
        """What is served, by its outputs; every byte of it is checked."""
        status(self.device, check=True)
        found = Device(self.device).run(BATCH)["y"].tobytes()
        return next(name for name, outputs in self.known.items() if outputs == found)

    def is_clean(self) -> bool:
        """Nothing lies about but what the state names."""
        names = {path.name for path in (self.device / "deltas").iterdir()}
        stages = [path for path in self.device.iterdir() if path.name.endswith(".tmp")]
        return names == status(self.device).state.names() and not stages


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


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
def test_every_step_may_fail(bench: Bench, monkeypatch: pytest.MonkeyPatch, dead: bool) -> None:
    seen = set()
    for fail in range(1, 200):
        with monkeypatch.context() as patch:
            saboteur = Saboteur(patch, fail, dead=dead)
            with contextlib.suppress(OutputError):  # nothing else comes of a full disk
                apply(bench.device, bench.b)
        seen.add(bench.serves())
        if saboteur.count < fail:
            break
        if not dead and bench.serves() == "a":
            assert bench.is_clean(), f"call {fail}"
        _reset(bench)
    assert seen == {"a", "b"}
    assert fail > 25, "the calls were counted"


def _reset(bench: Bench) -> None:
    """Serve `a` again, by the next command's own recovery."""
    apply(bench.device, bench.a)
    assert bench.serves() == "a"
    assert len(list((bench.device / "deltas").iterdir())) <= 2 + 1


def test_every_step_of_a_rollback_may_fail(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    for fail in range(1, 50):
        apply(bench.device, bench.b)
        with monkeypatch.context() as patch, contextlib.suppress(OutputError):
            saboteur = Saboteur(patch, fail, dead=True)
            rollback(bench.device)
        seen.add(bench.serves())
        if saboteur.count < fail:
            break
        _reset(bench)
    assert seen == {"a", "b"}
    assert fail > 5, "the calls were counted"


def _apply_for_ever(bench: Bench) -> int:
    """A child that applies two files in turn until it is killed; returns its process id."""
    child = os.fork()
    if child:
        return child
    try:
        for file in itertools.cycle((bench.b, bench.a)):
            apply(bench.device, file)
    finally:
        os._exit(1)


def kills(bench: Bench, count: int) -> Iterator[str]:
    """What is served after each of many kills, the folder used on as it is."""
    chance, began = random.Random(7), time.monotonic()
    apply(bench.device, bench.b)
    apply(bench.device, bench.a)
    longest = 2.0 * (time.monotonic() - began)
    for _ in range(count):
        child = _apply_for_ever(bench)
        time.sleep(chance.uniform(0.0, longest))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "the child died by itself"
        yield bench.serves()


def test_killed_at_random_moments(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_PAUSE", "0.002")
    seen = []
    for served in kills(bench, 100):  # 20, and more where a busy machine killed none in time
        seen.append(served)
        if len(seen) >= 20 and set(seen) == {"a", "b"}:
            break
    assert set(seen) == {"a", "b"}
    events = [entry["event"] for entry in Journal(bench.device / "journal").entries()]
    assert "recovered" in events, "no kill fell into an apply"
    apply(bench.device, bench.b)
    assert bench.serves() == "b"


@pytest.mark.slow
def test_two_hundred_kills(bench: Bench) -> None:
    assert set(kills(bench, 200)) == {"a", "b"}


def test_a_part_of_a_line_at_the_journals_end_is_removed(bench: Bench) -> None:
    place = bench.device / "journal"
    before = Journal(place).entries()
    with place.open("ab") as file:
        file.write(b'{"at":"2026')
    assert Journal(place).entries() == before
    apply(bench.device, bench.b)
    assert [e["event"] for e in Journal(place).entries()[len(before) :]] == [
        "proved",
        "built",
        "probed",
        "committed",
    ]


def test_the_journal_does_not_grow_for_ever(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "LIMIT", 4000)
    for _ in range(4):
        apply(bench.device, bench.b)
    entries = Journal(bench.device / "journal").entries()
    assert (bench.device / "journal").stat().st_size < 8000
    assert entries[-1]["event"] == "committed"
    assert bench.serves() == "b"
