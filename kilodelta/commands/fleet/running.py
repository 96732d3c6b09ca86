"""Do what a fleet has to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kilodelta import terminal
from kilodelta.commands.common import Command, as_json, with_progress
from kilodelta.commands.fleet.options import (
    SHOWN,
    address_option,
    cpus_option,
    engine_option,
    out_option,
    planned,
    require_engine,
)
from kilodelta.commands.fleet.planning import shown_plan

if TYPE_CHECKING:
    from kilodelta.fleet.local import FleetRun


def _shard(ctx: click.Context, option: click.Parameter, value: str | None) -> Any:
    if value is None:
        return None
    first, slash, second = value.partition("/")
    digits = first + second
    is_pair = bool(first and slash and second) and len(digits) < 20
    if not (is_pair and digits.isascii() and digits.isdigit()):
        raise click.BadParameter("write 3/8 for the third of eight")
    return int(first), int(second)


@click.command(
    cls=Command,
    short_help="Do what is open, here, in shards, or on a Ray cluster.",
    examples=[
        "kilodelta fleet run fleet.toml -o out/",
        "kilodelta fleet run fleet.toml -o out/ --shard 3/8",
        "kilodelta fleet run fleet.toml -o out/ --on ray --address auto",
    ],
)
@click.argument("file", type=click.Path())
@out_option
@click.option(
    "--jobs", type=click.IntRange(1), help="Tasks at once; by default what cores and memory allow."
)
@click.option("--shard", callback=_shard, metavar="K/N", help="Do the k-th of n parts.")
@engine_option
@address_option
@cpus_option
@click.option("--dry-run", is_flag=True, help="Show what would be done, as fleet plan does.")
@as_json
@with_progress
def run(
    file: str,
    out: str,
    jobs: int | None,
    shard: tuple[int, int] | None,
    engine: str,
    address: str | None,
    cpus: int,
    dry_run: bool,
    as_json: bool,
    progress: Any,
) -> Callable[[], None]:
    """Do what is open of a fleet FILE. A failure stops what depends on it and nothing else.

    The exit code is 17 where a task failed; `kilodelta fleet status` says which and why.
    """
    if engine == "ray" and (shard or jobs):
        raise click.UsageError("--shard and --jobs are for --on local")
    require_engine(engine, address)
    made = planned(file, out, progress)
    if dry_run:
        return shown_plan(made, engine, address, cpus, as_json)
    from kilodelta.fleet.status import remember

    remember(Path(out), file)
    if engine == "ray":
        from kilodelta.fleet.on_ray import run_on_ray

        done = run_on_ray(made, address=address, cpus=cpus, progress=progress)
    else:
        from kilodelta.fleet import run

        done = run(made, jobs=jobs, shard=shard, progress=progress)
    return lambda: _show_run(done, as_json)


def _show_run(done: FleetRun, as_json: bool) -> None:
    from kilodelta.errors import FleetError

    report = done.to_json()
    if as_json:
        terminal.print_json(report)
    else:
        rows = [(a["name"], a["exit_code"], a["error"], a["fix"]) for a in report["failed"]]
        rows += [(n, "", f"needs {c}, which failed", "") for n, c in report["skipped"].items()]
        if rows:
            terminal.print_table("Not done", ("task", "exit", "why", "fix"), rows[:SHOWN])
        terminal.print_line(
            f"{report['done']} made, {report['done_before']} done before, "
            f"{len(report['failed'])} failed, {len(report['skipped'])} not begun; {done.out}"
        )
    if report["failed"]:
        if as_json:  # the report is the one document
            click.get_current_context().exit(FleetError.exit_code)
        count = len(report["failed"])
        raise FleetError(
            f"{count} {'task' if count == 1 else 'tasks'} failed",
            fix="mend what is named and run it again",
        )
