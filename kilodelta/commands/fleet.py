"""Run many fine-tunes for many targets."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kilodelta import terminal
from kilodelta.commands.common import Command, as_json, with_progress

if TYPE_CHECKING:
    from kilodelta.fleet.graph import Plan
    from kilodelta.fleet.local import FleetRun

SHOWN = 60
out_option = click.option(
    "-o", "--out", default="fleet", type=click.Path(), help="The folder of results."
)

engine_option = click.option(
    "--on", "engine", default="local", type=click.Choice(["local", "ray"]), help="Where to run."
)
address_option = click.option(
    "--address", help="Of the Ray cluster; by default one is started here."
)
cpus_option = click.option("--cpus", default=1, type=click.IntRange(1), help="Of one task on Ray.")

PAGE = "fleet.html"
IN_OUT = ""
html_option = click.option(
    "--html",
    type=click.Path(),
    is_flag=False,
    flag_value=IN_OUT,
    metavar="[FILE]",
    help="Write a page of all fine-tunes by target; without a name, fleet.html beside the results.",
)


@click.group(short_help="Make many fine-tunes for many targets, from one TOML file.")
def fleet() -> None:
    """Make many fine-tunes for many targets, from one TOML file (docs/fleet.md).

    What is whole is not made again, so resuming is running again.
    """


@fleet.command(
    cls=Command,
    short_help="Show what is new, done, or to be made again, and why.",
    examples=[
        "kilodelta fleet plan fleet.toml -o out/",
        "kilodelta fleet plan fleet.toml -o out/ --on ray --address auto",
    ],
)
@click.argument("file", type=click.Path())
@out_option
@engine_option
@address_option
@cpus_option
@as_json
@with_progress
def plan(
    file: str, out: str, engine: str, address: str | None, cpus: int, as_json: bool, progress: Any
) -> Callable[[], None]:
    """Show the tasks of a fleet FILE: new, done, or to be made again and why; their memory, the
    size of their results and their time.

    With --on ray it is seen whether some machine of the cluster has what each task needs; the exit
    code is 9 where none has.
    """
    _require_engine(engine, address)
    made = _planned(file, out, progress)
    return _shown_plan(made, engine, address, cpus, as_json)


def _require_engine(engine: str, address: str | None) -> None:
    if engine == "local" and address:
        raise click.UsageError("--address is for --on ray")


def _shown_plan(
    made: Plan, engine: str, address: str | None, cpus: int, as_json: bool
) -> Callable[[], None]:
    """Return what shows a plan, and refuses one that a cluster cannot run."""
    if engine == "local":
        return lambda: terminal.print_json(made.to_json()) if as_json else _show_plan(made)
    from kilodelta.errors import InputError
    from kilodelta.fleet.cluster import connected, lacks, machines_of, require_resources

    tasks = made.open_tasks()
    with connected(address) as ray:
        machines = machines_of(ray)
    report = {
        **made.to_json(),
        "machines": len(machines),
        "lacks": [vars(one) for one in lacks(tasks, machines, cpus)],
    }

    def show() -> None:
        if as_json:
            terminal.print_json(report)
            if report["lacks"]:
                click.get_current_context().exit(InputError.exit_code)
        else:
            _show_plan(made)
            require_resources(tasks, machines, cpus)

    return show


def _planned(file: str, out: str, progress: Any) -> Plan:
    from kilodelta.fleet import make_plan, read_fleet

    return make_plan(read_fleet(file), out, progress=progress)


def _show_plan(made: Plan) -> None:
    report = made.to_json()
    open_rows = [row for row in report["tasks"] if row["status"] != "done"]
    rows = [
        (
            row["name"],
            row["kind"],
            row["status"],
            row["why"],
            terminal.size(row["memory"]),
            terminal.size(row["bytes"]),
            f"{row['seconds']:.0f}",
        )
        for row in open_rows[:SHOWN]
    ]
    if rows:
        columns = ("task", "kind", "status", "why", "memory", "result", "s")
        terminal.print_table("To do", columns, rows, right=(4, 5, 6))
    left = len(open_rows) - len(rows)
    counts = report["counts"]
    more = f" ({left} more with --json)" if left else ""
    terminal.print_line(
        f"{counts['new']} new, {counts['again']} to be made again, {counts['done']} done{more}"
    )
    if open_rows:
        total = report["expected"]
        by = "tasks that are done" if total["measured"] == len(open_rows) else "rules of thumb"
        terminal.print_line(
            f"about {terminal.size(total['bytes'])} of results and {total['seconds'] / 60:.0f} "
            f"minutes of one process, by {by}"
        )


def _shard(ctx: click.Context, option: click.Parameter, value: str | None) -> Any:
    if value is None:
        return None
    first, slash, second = value.partition("/")
    if not slash or not first.isascii() or not (first + second).isdigit() or not second:
        raise click.BadParameter("write 3/8 for the third of eight")
    return int(first), int(second)


@fleet.command(
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
@click.option("--jobs", type=click.IntRange(1), help="Tasks at once; by cores and memory.")
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
    _require_engine(engine, address)
    made = _planned(file, out, progress)
    if dry_run:
        return _shown_plan(made, engine, address, cpus, as_json)
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
        raise FleetError(
            f"{len(report['failed'])} tasks failed", fix="mend what is named and run it again"
        )


@fleet.command(
    cls=Command,
    short_help="Say what is done, failed and why; --html writes a page.",
    examples=[
        "kilodelta fleet status out/",
        "kilodelta fleet status fleet.toml -o out/ --html fleet.html",
    ],
)
@click.argument("file", type=click.Path())
@out_option
@html_option
@as_json
@with_progress
def status(
    file: str, out: str, html: str | None, as_json: bool, progress: Any
) -> Callable[[], None]:
    """Say what of a fleet is done, with fidelity, bytes and time, and what failed and why.

    FILE is the fleet's file, or the folder that a run has written into.
    """
    return _status(file, out, html, as_json, progress)


@fleet.command(
    cls=Command,
    short_help="Write the page of all fine-tunes by target, the worst first.",
    examples=["kilodelta fleet report out/ --html", "kilodelta fleet report out/ --html page.html"],
)
@click.argument("file", type=click.Path())
@out_option
@html_option
@as_json
@with_progress
def report(
    file: str, out: str, html: str | None, as_json: bool, progress: Any
) -> Callable[[], None]:
    """Show what `fleet status` shows, and write it as a page: OUT/fleet.html by default.

    FILE is the fleet's file, or the folder that a run has written into.
    """
    return _status(file, out, IN_OUT if html is None else html, as_json, progress)


def _status(
    file: str, out: str, html: str | None, as_json: bool, progress: Any
) -> Callable[[], None]:
    from kilodelta.fleet.status import located, status_of

    source, results = located(file, out)
    found = status_of(_planned(str(source), str(results), progress))
    page = str(results / PAGE) if html == IN_OUT else html
    if page is not None:
        from kilodelta.report import write_report

        # the results, as the page's links reach them
        folder = os.path.relpath(results, Path(page).resolve().parent)
        write_report(Path(page), "fleet", {**found, "folder": folder})
    return lambda: _show_status(found, as_json, page)


def _show_status(found: dict[str, Any], as_json: bool, html: str | None) -> None:
    if as_json:
        terminal.print_json(found)
        return
    rows = [
        (
            row["fine_tune"],
            row["target"],
            row["status"],
            "" if row["agreement"] is None else f"{row['agreement']:.4f}",
            row["parity"],
            terminal.size(row["nbytes"]) if row["nbytes"] else "",
            "" if row["seconds"] is None else f"{row['seconds']:.1f}",
            row["why"],
        )
        for row in found["rows"][:SHOWN]
    ]
    columns = ("fine-tune", "target", "status", "agreement", "parity", "bytes", "s", "why")
    terminal.print_table("The worst first", columns, rows, right=(3, 4, 5, 6))
    counts = ", ".join(f"{n} {name}" for name, n in found["counts"].items() if n)
    terminal.print_line(counts + (f"; {html}" if html else ""))
