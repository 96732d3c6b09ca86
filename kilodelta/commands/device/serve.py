"""Change what a device folder serves, and say what it serves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from kilodelta import terminal
from kilodelta.commands.common import (
    Command,
    as_json,
    max_work,
    with_dry_run,
    with_progress,
    with_spinner,
)

if TYPE_CHECKING:
    from kilodelta.device import Applied, Served, State, Status

HISTORY = 10
"""Journal entries shown, the latest ones."""
STDOUT = "-"
"""The name that stands for standard output in place of a file."""


@click.command(
    cls=Command,
    short_help="Serve a .kd file from a device folder, or change nothing.",
    examples=[
        "kilodelta apply device/ task-7.kd",
        "kilodelta apply device/ task-6.kd --allow-downgrade --json",
    ],
)
@click.argument("folder", type=click.Path())
@click.argument("file", type=click.Path())
@click.option("--allow-downgrade", is_flag=True, help="Take a file of a lower version.")
@click.option(
    "--allow-jump", is_flag=True, help="Take a version further ahead than the bundle allows."
)
@max_work
@as_json
@with_progress
@with_dry_run
def apply(folder: str, file: str, as_json: bool, progress: Any, **given: Any) -> Callable[[], None]:
    """Serve a .kd FILE from a device FOLDER: prove, build, probe, commit; or change nothing.

    On any error what was served before goes on being served. What goes wrong after the commit is
    a warning, and the command exits 0.
    """
    from kilodelta.device import apply

    done = apply(folder, file, progress=progress, **given)
    if as_json:
        return lambda: terminal.print_json(done.to_json())
    return lambda: _show_apply(done)


def _show_apply(done: Applied) -> None:
    rows: list[tuple[str, object]] = [
        ("serving", _served(done.state.serving)),
        ("before", _served(done.before.serving)),
    ]
    for name, error in done.seen.errors.items():
        most = done.seen.limits[name].relative_l2
        rows.append(("probe", f"{name} within {error.relative_l2:.2g} (at most {most:.2g})"))
    if not done.seen.errors:
        rows.append(("probe", "finite, and not the base's; the file states no golden values"))
    rows.append(("signed by", ", ".join(done.signed_by) or "nobody asked for: unsigned"))
    if done.result_proved:
        rows.append(("result proved", done.result))
    else:
        rows.append(("result", "not proved: weights are not merged here, only the probe tells"))
    terminal.print_facts(rows)
    _warn(done.warnings)


def _warn(warnings: Sequence[str]) -> None:
    for warning in warnings:
        terminal.print_warning(warning)


@click.command(
    cls=Command,
    short_help="Serve again what a device folder served before.",
    examples=["kilodelta rollback device/"],
)
@click.argument("folder", type=click.Path())
@as_json
@with_spinner
def rollback(folder: str, as_json: bool) -> Callable[[], None]:
    """Serve again what a device FOLDER served before.

    It still lies there, built and probed; its bytes are checked first. No network is needed.
    """
    from kilodelta.device import rollback

    done = rollback(folder)
    if as_json:
        return lambda: terminal.print_json(done.to_json())

    def show() -> None:
        terminal.print_facts(_standing(done.state))
        _warn(done.warnings)

    return show


@click.command(
    cls=Command,
    short_help="Say what a device folder serves and what was done to it.",
    examples=[
        "kilodelta status device/",
        "kilodelta status device/ --check --json",
        "kilodelta status device/ --prometheus /var/lib/node_exporter/textfile/kilodelta.prom",
    ],
)
@click.argument("folder", type=click.Path())
@click.option("--check", is_flag=True, help="Read every byte, and compare the digests.")
@click.option(
    "--prometheus",
    type=click.Path(),
    is_flag=False,
    flag_value="-",
    metavar="[FILE]",
    help="Metrics in Prometheus' text format, into a file for node_exporter, or printed.",
)
@as_json
@with_spinner
def status(folder: str, check: bool, prometheus: str | None, as_json: bool) -> Callable[[], None]:
    """Say what a device FOLDER is, what it serves, and what was done to it."""
    from kilodelta.device import status

    if prometheus == STDOUT and as_json:
        raise click.UsageError("--prometheus and --json both print: name a file for the metrics")
    done = status(folder, check=check, prometheus=None if prometheus == STDOUT else prometheus)
    if prometheus == STDOUT:
        from kilodelta.device.folder.metrics import metrics

        return lambda: click.echo(metrics(done), nl=False)
    if as_json:
        return lambda: terminal.print_json(done.to_json())
    return lambda: _show_status(done)


def _show_status(done: Status) -> None:
    used, free = done.nbytes["base"] + done.nbytes["deltas"], done.nbytes["free"]
    rows: list[tuple[str, object]] = [
        ("mode", f"{done.bundle.mode}, {done.bundle.dtype}, {done.bundle.runtime}"),
        ("base", f"{done.bundle.base_name or 'unnamed'} {done.bundle.base_root}"),
        *_standing(done.state),
        ("releases", _trusted(done)),
        ("disk", f"{terminal.size(used)} used, {terminal.size(free)} free"),
    ]
    if done.checked:
        rows.append(("checked", "every byte is as it was written"))
    if done.unfinished:
        rows.append(("unfinished", "a command is at work, or was killed: the next one recovers"))
    for entry in done.history[-HISTORY:]:
        why = f": {entry['why']}" if "why" in entry else ""
        rows.append((str(entry.get("at", "")), f"{entry['event']}{why}"))
    terminal.print_facts(rows)


def _trusted(done: Status) -> str:
    if done.pins is None:
        return "unsigned ones are taken: this device pins no keys"
    task = f", for task {done.pins.task}" if done.pins.task else ""
    return f"signed by {done.pins.threshold} of {len(done.pins.keys)} pinned keys{task}"


def _standing(state: State) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [("serving", _served(state.serving))]
    rows += [("rollback to", _served(item)) for item in state.before]
    return [*rows, ("highest", f"version {state.highest}")]


def _served(item: Served) -> str:
    return f"version {item.version}, {item.delta}" if item.delta else "the base"
