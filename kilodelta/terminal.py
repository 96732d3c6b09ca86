"""Print to the terminal: results on stdout, progress and errors on stderr, all as plain text.

Every text is escaped before it is printed (`kilodelta.errors.printable`), because much of what is
shown was written by whoever made a file: names, notes, the journal of a device.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kilodelta.errors import printable
from kilodelta.progress import Event, Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

CELL = 1000
"""Characters of one value in a table; JSON has them all."""
SILENCE = 0.5
"""Seconds after which a terminal shows that a command is at work, also before its first stage."""


def has_others() -> bool:
    """Return whether torchrun has started other processes beside this one."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def speaks() -> bool:
    """Return whether this process is to print: of several that torchrun has started, the first."""
    return not has_others() or os.environ.get("RANK", "0") == "0"


def print_json(value: Any) -> None:
    """Print one JSON document to stdout, its texts escaped as JSON allows."""
    text = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=False)
    print(text if _is_plain(text) else json.dumps(value, indent=2, sort_keys=False))


def _is_plain(text: str) -> bool:
    return printable(text, len(text), keep="\n") == text


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    right: Sequence[int] = (),
) -> None:
    """Print a table to stdout.

    Args:
        title: the line above it.
        columns: the heading of each column.
        rows: the cells of each row, as many as columns.
        right: numbers of the columns that are set flush right.
    """
    from rich.table import Table

    table = Table(title=_cell(title), title_justify="left", box=None, pad_edge=False)
    for number, name in enumerate(columns):
        justify = "right" if number in right else "left"
        table.add_column(_cell(name), justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*map(_cell, row))
    _stdout().print(table)


def _cell(value: object) -> Any:
    """Make a value `Text`, because rich reads markup in plain strings."""
    from rich.text import Text

    return Text(printable(str(value), CELL))


def print_facts(rows: Sequence[tuple[str, object]]) -> None:
    """Print names and values to stdout, one pair per line."""
    shown = [(printable(name, CELL), printable(str(value), CELL)) for name, value in rows]
    width = max(len(name) for name, _ in shown)
    for name, value in shown:
        print(f"{name:<{width}}  {value}")


def print_line(text: str) -> None:
    """Print one line to stdout."""
    print(printable(text))


def print_text(text: str) -> None:
    """Print a text of many lines to stdout, whole."""
    print(printable(text, len(text), keep="\n"))


def print_error(what: str, fix: str) -> None:
    """Print an error and the way out to stderr."""
    print(
        f"error: {printable(what, keep=chr(10))}\n  fix: {printable(fix, keep=chr(10))}",
        file=sys.stderr,
    )


def print_warning(what: str) -> None:
    """Print to stderr what went wrong beside a result that stands."""
    print(f"warning: {printable(what, keep=chr(10))}", file=sys.stderr)


def print_note(what: str) -> None:
    """Print to stderr what a user may want to hear before long work begins."""
    print(printable(what), file=sys.stderr)


class _Log(logging.Handler):
    """Prints records to stderr, as it is when a record comes: bars put themselves in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        print(printable(self.format(record), keep="\n"), file=sys.stderr)


def log_to_stderr(level: int) -> Callable[[], None]:
    """Print what the library logs to stderr.

    Args:
        level: the least level that is printed, such as `logging.INFO`.

    Returns:
        A function that ends it.
    """
    logger = logging.getLogger("kilodelta")
    before = logger.level
    handler = _Log()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(level)

    def stop() -> None:
        logger.removeHandler(handler)
        logger.setLevel(before)

    return stop


def _stdout() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)


def size(count: float) -> str:
    """Return bytes as a person reads them, in powers of 1000.

    Example:
        >>> size(812), size(9500), size(2.1e9)
        ('812 B', '9.5 KB', '2.1 GB')
    """
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


@contextmanager
def progress(*, quiet: bool) -> Iterator[Progress]:
    """Yield a callback that draws bars on a terminal, or prints one line per stage elsewhere.

    With `quiet` it prints nothing.
    """
    if quiet:
        yield lambda event: None
    elif sys.stderr.isatty():
        drawn = _Drawn(_bars())
        try:
            yield drawn
        finally:
            drawn.close()
    else:
        lines = _Lines()
        yield lines
        lines.close()


def _bars() -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    return Progress(
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.description:<8}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[amount]:>22}", markup=False),
        TextColumn("{task.fields[detail]}", markup=False),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


class _Drawn:
    """Bars on a terminal: one for each stage, and a spinner while no stage is at work.

    Models and packages load before the first stage and between stages, and some commands have
    none. The first spinner appears after `SILENCE`, so that quick answers do not flicker.
    """

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._tasks: dict[str, Any] = {}
        self._shown: dict[str, float] = {}
        self._began: dict[str, float] = {}
        self._lock = threading.Lock()
        self._state = "new"
        self._spinner: Any = None
        self._spin(True)
        self._timer = threading.Timer(SILENCE, self._start)
        self._timer.daemon = True
        self._timer.start()

    def __call__(self, event: Event) -> None:
        now = time.monotonic()
        stage = event.stage
        if event.done < event.total and now - self._shown.get(stage, 0.0) < 0.1:
            return
        self._shown[stage] = now
        spent = now - self._began.setdefault(stage, now)
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(printable(stage, 40), amount="", detail="")
            self._start()
        self._bars.update(
            self._tasks[stage],
            completed=event.done,
            total=event.total or None,
            amount=_amount(event),
            detail=f"{_rate(event, spent)}  {_detail(event)}",
        )
        self._spin(0 < event.total <= event.done)

    def close(self) -> None:
        """Leave the stages on the terminal, or nothing where there were none."""
        self._timer.cancel()
        self._spin(False)
        with self._lock:
            if self._state == "drawing":
                self._bars.live.transient = not self._tasks
                self._bars.stop()
            self._state = "closed"

    def _spin(self, wanted: bool) -> None:
        """Show a spinner below all stages, or take it away."""
        if wanted and self._spinner is None:
            self._spinner = self._bars.add_task("working", total=None, amount="", detail="")
        elif not wanted and self._spinner is not None:
            self._bars.remove_task(self._spinner)
            self._spinner = None

    def _start(self) -> None:
        with self._lock:
            if self._state == "new":
                self._state = "drawing"
                self._bars.start()


def _rate(event: Event, seconds: float) -> str:
    """Units per second; empty before there is enough time to divide by."""
    if seconds < 0.2:
        return ""
    rate = event.done / seconds
    return f"{size(rate)}/s" if event.unit == "B" else f"{rate:.1f} {event.unit}/s"


def _amount(event: Event) -> str:
    if event.unit == "B":
        return f"{size(event.done)} of {size(event.total)}"
    return f"{event.done} of {event.total} {event.unit}" if event.total else f"{event.done}"


def _detail(event: Event) -> str:
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {printable(str(value), 80)}"
        for name, value in event.detail.items()
    )


class _Lines:
    """Progress without a terminal: one line when a stage ends, and one every ten seconds."""

    def __init__(self) -> None:
        self.stage: Event | None = None
        self.began = self.printed = time.monotonic()

    def __call__(self, event: Event) -> None:
        now = time.monotonic()
        if self.stage is None or event.stage != self.stage.stage:
            self.close()
            self.began = self.printed = now
        elif now - self.printed > 10:
            self._print(event, now)
        self.stage = event

    def _print(self, event: Event, now: float) -> None:
        self.printed = now
        spent = now - self.began
        text = f"{event.stage}: {_amount(event)} after {spent:.1f} s"
        print(*filter(None, (text, _rate(event, spent), _detail(event))), sep="  ", file=sys.stderr)

    def close(self) -> None:
        if self.stage is not None:
            self._print(self.stage, time.monotonic())
        self.stage = None
