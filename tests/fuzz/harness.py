"""Run a surface on damaged inputs, and measure: outcome, processor time and memory of each."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any, TypeAlias

from kilodelta.errors import KiloDeltaError
from tests.fuzz.mutations import Mutate

Read: TypeAlias = Callable[[Path], object]
"""Reads the example in a folder, as commands do."""

SECONDS = 5.0
"""Processor time that one input may take. What waits (a pipe) is stopped by the clock instead."""
WAITS = 60.0
FREE, TIMES = 64 << 20, 4
"""Memory that one input may take: `FREE` bytes, and `TIMES` its size."""
SLACK = 4 << 20
"""What the kernel's mark of the peak may lie above resident memory after it was set back."""
PLACES = 0.03
"""The share of inputs in which a file is replaced by a link, a pipe, a folder or nothing."""


@dataclass(frozen=True, kw_only=True)
class Surface:
    """One kind of file that a stranger may have made.

    Attributes:
        name: in the table, and for `--surface`.
        make: writes a valid example into its first folder, and what is trusted into the second;
            returns the reader.
        mutate: by a file's path in the example, or a suffix such as `*.json`: how it is damaged.
        needs: packages without which it cannot be run.
    """

    name: str
    make: Callable[[Path, Path], Read]
    mutate: Mapping[str, tuple[Mutate, ...]]
    needs: tuple[str, ...] = ()

    def mutators(self, name: str) -> tuple[Mutate, ...]:
        """How a file of the example is damaged; empty if it stays as it is."""
        suffix = "*" + Path(name).suffix
        return self.mutate.get(name) or self.mutate.get(suffix) or ()


@dataclass(kw_only=True)
class Result:
    """What a run showed; one row of the table."""

    surface: str
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    tracebacks: int = 0
    hangs: int = 0
    over_memory: int = 0
    slowest_seconds: float = 0.0
    peak_bytes: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether no input showed a fault."""
        return not (self.tracebacks or self.hangs or self.over_memory)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


class Hang(BaseException):
    """An input took too long. No code that catches `Exception` catches it."""


def run(
    surface: Surface,
    count: int,
    *,
    seed: int = 0,
    first: int = 0,
    show: Callable[[str], None] = lambda text: None,
    each: Callable[[Result], None] = lambda result: None,
) -> Result:
    """Feed `count` damaged inputs to a surface.

    Args:
        surface: what to read.
        count: how many inputs.
        seed: of all randomness, with the surface's name and the input's number.
        first: the number of the first input.
        show: is given the first fault of each kind as text, with its traceback.
        each: is given the result so far after every input.
    """
    result = Result(surface=surface.name)
    with tempfile.TemporaryDirectory(dir=_fast()) as place, _quiet(Path(place)):
        example, trusted = Path(place) / "example", Path(place) / "trusted"
        example.mkdir()
        trusted.mkdir()
        read = surface.make(example, trusted)
        files = {str(p.relative_to(example)): p.read_bytes() for p in _files(example)}
        folders = [str(p.relative_to(example)) for p in example.rglob("*") if p.is_dir()]
        shutil.copytree(example, Path(place) / "work", symlinks=True)
        # The valid example first: it must pass, and it loads what is loaded once.
        read(Path(place) / "work")
        seen: Counter[str] = Counter()
        for number in range(first, first + count):
            random = Random(f"{surface.name} {seed} {number}")
            work = Path(place) / "work"
            shutil.rmtree(work)
            for folder in folders:
                (work / folder).mkdir(parents=True, exist_ok=True)
            work.mkdir(exist_ok=True)
            size = _write_damaged(surface, files, work, random)
            _one(read, work, size, number, result, seen, show)
            each(result)
    return result


def _fast() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _write_damaged(surface: Surface, files: Mapping[str, bytes], work: Path, random: Random) -> int:
    """Write the example with one or two of its files damaged; return its bytes."""
    names = [name for name in files if surface.mutators(name)]
    chosen = {random.choice(names) for _ in range(random.choice((1, 1, 1, 2)))}
    size = 0
    for name, data in files.items():
        path = work / name
        if name in chosen and random.random() < PLACES:
            size += _replaced(path, data, random)
            continue
        if name in chosen:
            data = random.choice(surface.mutators(name))(data, random)
        path.write_bytes(data)
        size += len(data)
    return size


def _replaced(path: Path, data: bytes, random: Random) -> int:
    """Put something else than a regular file in a file's place."""
    step = random.randrange(6)
    if step == 0:
        path.symlink_to("/etc/hostname")
    elif step == 1:
        path.symlink_to(path.name)
    elif step == 2:
        os.mkfifo(path)
    elif step == 3:
        path.mkdir()
    elif step == 4:
        path.symlink_to("/dev/zero")
    return 0


def _one(
    read: Read,
    work: Path,
    size: int,
    number: int,
    result: Result,
    seen: Counter[str],
    show: Callable[[str], None],
) -> None:
    outcome = _outcome(read, work)
    if outcome.is_heavy(size):
        # What is loaded or compiled once is not the input's: let it be, and measure again.
        _outcome(read, work, seconds=60 * SECONDS)
        outcome = _outcome(read, work)
    result.inputs += 1
    result.slowest_seconds = max(result.slowest_seconds, round(outcome.seconds, 3))
    result.peak_bytes = max(result.peak_bytes, outcome.memory)
    name = {None: "accepted", "refused": "refused", "hang": "hangs"}.get(outcome.kind, "tracebacks")
    setattr(result, name, getattr(result, name) + 1)
    if outcome.kind not in (None, "refused"):
        _say(seen, show, outcome.kind or "", outcome.text, number)
        result.faults.append(f"{number}: {outcome.kind}")
    if outcome.memory > FREE + TIMES * size:
        result.over_memory += 1
        fault = f"{outcome.memory >> 20} MB for an input of {size} bytes"
        _say(seen, show, "memory", fault, number)
        result.faults.append(f"{number}: {fault}")


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """What one input did: `kind` is None, `refused`, `hang` or says what was raised, and where."""

    kind: str | None
    text: str
    seconds: float
    memory: int

    def is_heavy(self, size: int) -> bool:
        return self.kind == "hang" or self.memory > FREE + TIMES * size


def _outcome(read: Read, work: Path, *, seconds: float | None = None) -> _Outcome:
    kind, text = None, ""
    peak, began = _Peak(), time.process_time()
    try:
        with _limited(seconds or SECONDS):
            read(work)
    except KiloDeltaError as error:
        text = _unprintable(error)
        kind = "unprintable" if text else "refused"
    except Hang:
        kind, text = "hang", traceback.format_exc(limit=-8)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # every other kind is a fault, SystemExit as well
        kind, text = f"{type(error).__name__} {_where(error)}", traceback.format_exc(limit=-8)
    took, memory = time.process_time() - began, peak.growth()
    return _Outcome(kind=kind, text=text, seconds=took, memory=memory)


def _say(
    seen: Counter[str], show: Callable[[str], None], kind: str, text: str, number: int
) -> None:
    seen[kind] += 1
    if seen[kind] == 1:
        show(f"input {number}: {text}")


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"


def _unprintable(error: KiloDeltaError) -> str:
    text = str(error)
    if len(text) > 10_000 or not all(c.isprintable() or c in "\n\u3000\xa0" for c in text):
        return f"unprintable message of {len(text)} characters: {text[:200]!r}"
    return ""


class _Peak:
    """Measures the most memory that is taken from now on.

    The kernel's mark of the peak is exact, and can be set back on most systems. Where it cannot, an
    earlier peak of the process would hide every later one; Python's own allocations, which hold
    numpy's arrays, are traced there instead.
    """

    def __init__(self) -> None:
        self._resets = _reset_peak()
        self._traces_before = tracemalloc.is_tracing()
        if not self._resets:
            tracemalloc.start()
            tracemalloc.reset_peak()
        self._before = self._now()

    def growth(self) -> int:
        """Return the bytes that the peak lies above the start. Call it once."""
        grown = max(0, self._now() - self._before)
        if not self._resets and not self._traces_before:
            tracemalloc.stop()
        return grown

    def _now(self) -> int:
        return _memory(b"VmHWM:") if self._resets else tracemalloc.get_traced_memory()[1]


def _reset_peak() -> bool:
    """Set the kernel's mark of the peak to what is resident now; return whether it moved there."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _memory(b"VmHWM:") - _memory(b"VmRSS:") < SLACK
    except (OSError, ValueError):
        return False


def _memory(name: bytes) -> int:
    """Return a line of `/proc/self/status` in bytes.

    Raises:
        OSError, ValueError: no such file, or no such line.
    """
    with open("/proc/self/status", "rb") as file:
        for line in file:
            if line.startswith(name):
                return int(line.split()[1]) << 10
    raise ValueError(name)


@contextlib.contextmanager
def _limited(processor: float) -> Iterator[None]:
    """Raise `Hang` after so much processor time, or `WAITS` of waiting."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang

    for which, kind, seconds in (
        (signal.ITIMER_PROF, signal.SIGPROF, processor),
        (signal.ITIMER_REAL, signal.SIGALRM, max(WAITS, processor)),
    ):
        signal.signal(kind, stop)
        signal.setitimer(which, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


@contextlib.contextmanager
def _quiet(place: Path) -> Iterator[None]:
    """Keep libraries from writing to the terminal, and caches inside the run's own folder."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(place / "cache")
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nothing:
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(nothing), contextlib.redirect_stdout(nothing):
                yield
    finally:
        if before is None:
            del os.environ["XDG_CACHE_HOME"]
        else:
            os.environ["XDG_CACHE_HOME"] = before
        sys.stdout.flush()
