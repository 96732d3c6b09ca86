"""Three kinds of fault: a kill at a random moment, a full disk, and two writers of one process id.

Each trial works on a fresh copy of the scene's folder, in a child process.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from kilodelta.errors import KiloDeltaError
from tests.faults.scenes import NEW, Scene

DONE, REFUSED, BROKEN = 0, 10, 11
"""How a child ended: well, with a `KiloDeltaError`, or with any other exception."""
_NEW_PID_NAMESPACE = 0x20000000


@dataclass(kw_only=True)
class Result:
    """What a kind of fault showed at one command; a row of the table."""

    command: str
    fault: str
    trials: int = 0
    in_time: int = 0
    """Faults that came while the command was at work."""

    new: int = 0
    """Trials after which the new result stood."""

    mixtures: int = 0
    lost: int = 0
    """Trials after which the command could not be done again."""

    leftovers: int = 0
    tracebacks: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether nothing went wrong."""
        return not (self.mixtures or self.lost or self.leftovers or self.tracebacks)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


class Stage:
    """A scene made ready once, and copies of it to work in."""

    def __init__(self, scene: Scene, root: Path) -> None:
        self.scene, self.root = scene, root
        self.temporary = root / "temporary"
        self.temporary.mkdir()
        (root / "ready").mkdir()
        scene.ready(root / "ready")
        work = self.fresh()
        began = time.monotonic()
        scene.act(work)  # loads and compiles what is loaded once, before any child is made
        assert scene.judge(work) == NEW
        left = scene.left(work)
        assert not left, left
        work = self.fresh()
        began = time.monotonic()
        assert self.wait(self.child(lambda: scene.act(work))) == DONE
        self.seconds = time.monotonic() - began
        scene.judge(work)

    def fresh(self, place: Path | None = None) -> Path:
        """Return a new copy of the folder as it is before the command."""
        work = place or self.root / "work"
        if place is None:
            shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(self.root / "ready", work, symlinks=True, dirs_exist_ok=True)
        return work

    def child(self, act: Callable[[], object]) -> int:
        """Do something in a child process; return its id."""
        child = os.fork()
        if child:
            return child
        code = BROKEN
        try:
            tempfile.tempdir = str(self.temporary)
            # What a command prints is not of interest; its traceback is.
            with open(self.root / "errors", "w") as errors, contextlib.redirect_stdout(errors):
                try:
                    act()
                    code = DONE
                except KiloDeltaError:
                    code = REFUSED
                except BaseException:
                    traceback.print_exc(file=errors)
        finally:
            os._exit(code)

    def wait(self, child: int) -> int:
        """Return how a child ended; minus the signal's number if by one."""
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def trouble(self) -> str:
        """The last line of what a child that broke had to say."""
        lines = (self.root / "errors").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no traceback"

    def settle(self, work: Path, result: Result) -> None:
        """Judge what stands, do the command again, and see that nothing lies about."""
        scene = self.scene
        result.trials += 1
        try:
            result.new += scene.judge(work) == NEW
        except Exception as error:
            result.mixtures += 1
            result.notes.append(f"mixture: {type(error).__name__}: {error}"[:300])
            return
        try:
            scene.again(work)
            code = self.wait(self.child(lambda: scene.act(work)))
            stands = scene.judge(work)
        except Exception as error:
            code, stands = BROKEN, f"{type(error).__name__}: {error}"[:200]
        if code != DONE or stands != NEW:
            result.lost += 1
            result.notes.append(f"lost: again ended with {code}, {stands}: {self.trouble()}")
        left = scene.left(work) + [f"$TMPDIR/{name}" for name in os.listdir(self.temporary)]
        if left:
            result.leftovers += 1
            result.notes.append(f"left: {left[:5]}")


@contextlib.contextmanager
def staged(scene: Scene) -> Iterator[Stage]:
    """Make a scene ready in a temporary folder."""
    with tempfile.TemporaryDirectory() as root:
        yield Stage(scene, Path(root))


def kills(stage: Stage, count: int, random: Random) -> Result:
    """Kill the command at random moments."""
    result = Result(command=stage.scene.name, fault="kill")
    for _ in range(count):
        work = stage.fresh()
        child = stage.child(partial(stage.scene.act, work))
        time.sleep(random.uniform(0, 1.1 * stage.seconds))
        os.kill(child, signal.SIGKILL)
        ended = stage.wait(child)
        result.in_time += ended == -signal.SIGKILL
        if ended == BROKEN:
            result.tracebacks += 1
            result.notes.append(stage.trouble())
        stage.settle(work, result)
    return result


def full_disks(stage: Stage, count: int, random: Random) -> Result:
    """Do the command on a disk that is full after a random number of bytes.

    The disk is a tmpfs of its own where this process may mount one. Elsewhere no file may grow
    beyond a limit, which the kernel answers in the same place.
    """
    result = Result(command=stage.scene.name, fault="full disk")
    for _ in range(count):
        with _small_disk(stage, random) as (work, act, free):
            ended = stage.wait(stage.child(act))
            free()
            result.in_time += ended == REFUSED
            if ended not in (DONE, REFUSED):
                result.tracebacks += 1
                result.notes.append(stage.trouble())
            stage.settle(work, result)
    return result


@contextlib.contextmanager
def _small_disk(
    stage: Stage, random: Random
) -> Iterator[tuple[Path, Callable[[], object], Callable[[], None]]]:
    place = stage.root / "disk"
    place.mkdir(exist_ok=True)
    if _mount(place, "size=64m"):
        try:
            work = stage.fresh(place / "work")
            used = shutil.disk_usage(place).used
            room = random.choice((0, 4096, *(random.randrange(1 << 20) for _ in range(3))))
            _mount(place, f"remount,size={used + room}")
            yield work, lambda: stage.scene.act(work), lambda: _free(place)
        finally:
            subprocess.run(["umount", "-l", str(place)], check=True)
        return
    work = stage.fresh()
    limit = random.choice((1, 100, random.randrange(1 << 14), random.randrange(1 << 20)))
    yield work, lambda: _limited(stage.scene.act, work, limit), lambda: None


def _free(place: Path) -> None:
    _mount(place, "remount,size=64m")


def _mount(place: Path, options: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    return sys.platform == "linux" and not subprocess.run(command, capture_output=True).returncode


def _limited(act: Callable[[Path], object], work: Path, limit: int) -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    act(work)


def pairs(stage: Stage, count: int, random: Random) -> Result:
    """Do the command twice at once in the same place, by two processes of one id.

    Each has a namespace of ids to itself, as two containers have; where that is not allowed,
    `os.getpid` gives the same number to both.
    """
    result = Result(command=stage.scene.name, fault="pair")
    for _ in range(count):
        work = stage.fresh()
        codes = _pair(stage, work, random.uniform(0, stage.seconds / 2))
        result.in_time += REFUSED in codes
        if BROKEN in codes or DONE not in codes:
            result.tracebacks += 1
            result.notes.append(f"ended with {codes}: {stage.trouble()}")
        stage.settle(work, result)
    return result


def _pair(stage: Stage, work: Path, delay: float) -> list[int]:
    """How two ended that began at once, or the second a little later."""
    begin, end = os.pipe()
    children = [
        stage.child(partial(_as_one, begin, end, wait, partial(stage.scene.act, work)))
        for wait in (0.0, delay)
    ]
    os.close(begin)
    os.close(end)  # both begin now
    return [stage.wait(child) for child in children]


def _as_one(begin: int, end: int, delay: float, act: Callable[[], object]) -> None:
    """Wait for the signal to begin, take the one process id, and act."""
    os.close(end)
    os.read(begin, 1)
    time.sleep(delay)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_PID_NAMESPACE) != 0:
        os.getpid = lambda: 7
        act()
        return
    child = os.fork()  # the first process of the new namespace: its id there is 1
    if child == 0:
        code = BROKEN
        try:
            act()
            code = DONE
        except KiloDeltaError:
            code = REFUSED
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(code if code >= 0 else BROKEN)


KINDS = {"kills": kills, "full": full_disks, "pairs": pairs}
