"""Show what a fleet has to do."""

from __future__ import annotations

from collections.abc import Callable
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

if TYPE_CHECKING:
    from kilodelta.fleet.graph import Plan


@click.command(
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
    size of their results and their time. A .kd file that is damaged or of another base is named.

    With --on ray it is seen whether some machine of the cluster has what each task needs; the exit
    code is 9 where none has.
    """
    require_engine(engine, address)
    made = planned(file, out, progress)
    return shown_plan(made, engine, address, cpus, as_json)


def shown_plan(
    made: Plan, engine: str, address: str | None, cpus: int, as_json: bool
) -> Callable[[], None]:
    """Return what shows a plan, and refuses one that a cluster cannot run.

    Args:
        made: the plan.
        engine: "local" or "ray".
        address: of the Ray cluster; None for the one that Ray finds.
        cpus: cores that each task takes on a cluster.
        as_json: show one JSON object instead of tables.
    """
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


def _show_plan(made: Plan) -> None:
    report = made.to_json()
    for name, fault in list(made.faults.items())[:SHOWN]:
        terminal.print_warning(f"all tasks of {name} will fail: {fault}")
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
