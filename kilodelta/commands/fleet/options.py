"""Options that the commands of a fleet share, and the plan that each of them begins with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from kilodelta.fleet.graph import Plan

SHOWN = 60
"""Rows of a table."""

out_option = click.option(
    "-o", "--out", default="fleet", type=click.Path(), help="The folder of results."
)

engine_option = click.option(
    "--on", "engine", default="local", type=click.Choice(["local", "ray"]), help="Where to run."
)
address_option = click.option(
    "--address", help="The Ray cluster's address, or auto; by default one is started here."
)
cpus_option = click.option(
    "--cpus", default=1, type=click.IntRange(1), help="Cores of a task on Ray."
)


def require_engine(engine: str, address: str | None) -> None:
    """Refuse an address where nothing runs on a cluster."""
    if engine == "local" and address:
        raise click.UsageError("--address is for --on ray")


def planned(file: str, out: str, progress: Any) -> Plan:
    """Read a fleet file, and see what of it is done in a folder of results."""
    from kilodelta.fleet import make_plan, read_fleet

    return make_plan(read_fleet(file), out, progress=progress)
