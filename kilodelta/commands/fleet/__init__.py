"""Gather the commands that make many fine-tunes for many targets."""

from __future__ import annotations

import click

from kilodelta.commands.fleet.planning import plan
from kilodelta.commands.fleet.reporting import report, status
from kilodelta.commands.fleet.running import run

__all__ = ["fleet"]


@click.group(short_help="Make many fine-tunes for many targets, from one TOML file.")
def fleet() -> None:
    """Make many fine-tunes for many targets, from one TOML file (docs/fleet.md).

    What is whole is not made again, so resuming is running again.
    """


for command in (plan, run, status, report):
    fleet.add_command(command)
