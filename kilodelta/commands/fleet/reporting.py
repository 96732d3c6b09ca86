"""Say what of a fleet is done, as a table or a page."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from kilodelta import terminal
from kilodelta.commands.common import Command, as_json, with_progress
from kilodelta.commands.fleet.options import SHOWN, out_option, planned

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


@click.command(
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


@click.command(
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
    found = status_of(planned(str(source), str(results), progress))
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
