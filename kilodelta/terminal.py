"""What the command line shows: tables and JSON on stdout, progress and errors on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kilodelta.progress import Event, Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

    from kilodelta.compress.distill.report import Report
    from kilodelta.demo.run import Demo
    from kilodelta.verify.verification import Verification


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=False))


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    right: Sequence[int] = (),
) -> None:
    """A table on stdout; `right` holds the numbers of the columns set flush right."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False)
    for number, name in enumerate(columns):
        justify = "right" if number in right else "left"
        table.add_column(Text(name), justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    _stdout().print(table)


def print_facts(rows: Sequence[tuple[str, object]]) -> None:
    """Names and values on stdout, one a line."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _stdout() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)


def size(count: float) -> str:
    """Bytes as a person reads them: 812 B, 9.5 KB, 2.1 GB (powers of 1000)."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


@contextmanager
def progress(*, quiet: bool) -> Iterator[Progress]:
    """A callback that draws bars on a terminal, a line a stage elsewhere, nothing when quiet."""
    if quiet:
        yield lambda event: None
    elif sys.stderr.isatty():
        with _bars() as bars:
            yield _drawn(bars)
    else:
        lines = _Lines()
        yield lines
        lines.close()


def _bars() -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description:<8}"),
        BarColumn(),
        TextColumn("{task.fields[amount]:>22}"),
        TextColumn("{task.fields[detail]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _drawn(bars: Bars) -> Callable[[Event], None]:
    tasks: dict[str, Any] = {}
    shown: dict[str, float] = {}
    began: dict[str, float] = {}

    def show(event: Event) -> None:
        now = time.monotonic()
        if event.done < event.total and now - shown.get(event.stage, 0.0) < 0.1:
            return
        shown[event.stage] = now
        spent = now - began.setdefault(event.stage, now)
        if event.stage not in tasks:
            tasks[event.stage] = bars.add_task(event.stage, amount="", detail="")
        bars.update(
            tasks[event.stage],
            completed=event.done,
            total=event.total or None,
            amount=_amount(event),
            detail=f"{_rate(event, spent)}  {_detail(event)}",
        )

    return show


def _rate(event: Event, seconds: float) -> str:
    """What is done in a second, once that can be told."""
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
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in event.detail.items()
    )


class _Lines:
    """Progress where no terminal is: a line when a stage ends, and every ten seconds."""

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


def show_compression(report: Report, *, as_json: bool) -> None:
    """What a compression kept and cost."""
    if as_json:
        print_json(report.to_json())
        return
    options = ", ".join(f"{k} {v}" for k, v in report.method.items() if k != "name")
    whole = report.nbytes["file"]
    rows: list[tuple[str, object]] = [
        ("file", f"{report.path}, {size(whole)}: {report.tuned_bytes / whole:,.0f}x smaller"),
        ("method", f"{report.method['name']}: {options}, {report.bits} bits"),
        ("targets", f"{report.targets} tensors"),
        *(("extra", name) for name in report.extras),
    ]
    if report.after is not None and report.before is not None:
        rows += [
            (
                f"{report.kind}",
                f"{report.after.agreement:.4f} with the tuned model on "
                f"{report.held_out} held-out inputs; the base alone {report.before.agreement:.4f}",
            ),
            (
                "divergence",
                f"{report.after.divergence:.4f}, the base's {report.before.divergence:.4f}",
            ),
        ]
    rows += [
        ("weights", f"error {report.weight_error:.3f} of the change (1 is the base's)"),
        (
            "time",
            f"{report.seconds:.0f} s, {report.steps} steps"
            + (", interrupted: the best state so far" if report.interrupted else ""),
        ),
        *(("bytes", f"{count:>9}  {part}") for part, count in report.nbytes.items()),
    ]
    if report.dropped:
        names = ", ".join(change.name for change in report.dropped[:3])
        rows.append(
            (
                "not stored",
                f"{len(report.dropped)} changed tensors with "
                f"{report.dropped_energy:.1%} of the change ({names}, ...); see --extras",
            )
        )
    print_facts([*rows, ("result", report.result)])


def show_verification(found: Verification, *, as_json: bool) -> None:
    """What was proved; exits with the failure's code where something was not."""
    if as_json:
        print_json(found.to_json())
    else:
        _print_proof(found)
    _exit_with(found)


def _exit_with(found: Verification) -> None:
    if found.failure is not None:
        print_error(found.failure.what, found.failure.fix)
        raise SystemExit(found.failure.exit_code)


def _print_proof(found: Verification) -> None:
    proof, export, report = found.proof, found.export, found.report
    rows = [
        ("base proved", proof.base),
        ("result proved", f"{proof.result} ({proof.targets} targets)"),
    ]
    if proof.merged:
        rows.append(("merged proved", proof.merged))
    if export is not None:
        count = sum(len(artefact.files) for artefact in export.artefacts)
        rows.append(("export proved", f"{count} files, by digest"))
    compared = "not compared; give --inputs for that" if report is None else report.summary()
    rows.append(("outputs", compared))
    print_facts(rows)
    for table in () if report is None else report.tables():
        print()
        print_table(table.title, table.columns, table.rows, right=table.right)


def show_demo(done: Demo, *, as_json: bool) -> None:
    """Each step with the command for it, what was proved, and bytes beside accuracy."""
    if as_json:
        print_json(done.to_json())
        _exit_with(done.verification)
        return
    for step in done.steps:
        print(f"{step.name} ({step.seconds:.1f} s): {step.said}")
        if step.command:
            print(f"  $ {step.command}")
    print()
    _print_proof(done.verification)
    print()
    rows = [
        (row.name, size(row.nbytes), f"{row.accuracy:.1%}", _bar(row.accuracy)) for row in done.rows
    ]
    print_table("Test accuracy", ("model", "bytes", "right", ""), rows, right=(1, 2))
    print(f"\nAll files are in {done.folder}; the commands above run there.")
    _exit_with(done.verification)


def _bar(share: float, width: int = 40) -> str:
    return "█" * round(share * width)


def print_error(what: str, fix: str) -> None:
    """An error and its way out on stderr, as plain text."""
    print(f"error: {what}\n  fix: {fix}", file=sys.stderr)
