"""Compare two models or .kd files, and describe a .kd file on a model card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kilodelta import terminal
from kilodelta.commands.common import Command, as_json, with_progress, with_spinner

if TYPE_CHECKING:
    from kilodelta.merging.diff import Difference

SHOWN = 40


@click.command(
    cls=Command,
    short_help="Say in which tensors two models, or two .kd files, differ.",
    examples=[
        "kilodelta diff base/ tuned/",
        "kilodelta diff a.kd b.kd",
        "kilodelta diff a.kd b.kd --base base/",
    ],
)
@click.argument("first", type=click.Path())
@click.argument("second", type=click.Path())
@click.option("--base", type=click.Path(), help="Of two .kd files: compare their updates as well.")
@click.option("--all", "every", is_flag=True, help=f"Show all tensors, not the first {SHOWN}.")
@as_json
@with_progress
def diff(
    first: str, second: str, base: str | None, every: bool, as_json: bool, progress: Any
) -> Callable[[], None]:
    """Say in which tensors FIRST and SECOND differ, the largest share of the change first.

    Models are compared by value, also across float types. The exit code is 0 whether they differ or
    not.
    """
    from kilodelta.merging.diff import diff
    from kilodelta.models import locate, locate_either

    first, second = str(locate_either(first)), str(locate_either(second))
    base = None if base is None else str(locate(base))
    found = diff(first, second, base=base, progress=progress)
    if as_json:
        return lambda: terminal.print_json(found.to_json())
    return lambda: _show(found, every)


def _shown(field: str, fact: Any) -> str:
    """Write a fact of a file as `kilodelta inspect` does."""
    from kilodelta.format.method_options import options_in_words

    if field == "method":
        return f"{fact['name']}: {options_in_words(fact)}"
    if isinstance(fact, dict):
        return ", ".join(f"{key} {value}" for key, value in fact.items())
    return " ".join(map(str, fact)) if isinstance(fact, (list, tuple)) else str(fact)


def _show(found: Difference, every: bool) -> None:
    if found.equal:
        terminal.print_line("equal")
        return
    if found.facts:
        facts = [(name, _shown(name, a), _shown(name, b)) for name, (a, b) in found.facts.items()]
        terminal.print_table("The files say", ("field", "first", "second"), facts)
    shown = found.rows if every else found.rows[:SHOWN]
    if shown:
        columns = ("tensor", "change", "relative norm", "share", "largest", "first", "second")
        rows = [
            (
                row.name,
                row.change,
                "" if row.relative is None else f"{row.relative:.3g}",
                "" if row.share is None else f"{100 * row.share:.1f}%",
                "" if row.largest is None else f"{row.largest:.3g}",
                *row.kinds,
            )
            for row in shown
        ]
        terminal.print_table("Tensors that differ", columns, rows, right=(2, 3, 4))
    if not found.rows and not found.same:  # two .kd files, and what they say differs
        terminal.print_line("updates were not compared; give --base for that")
        return
    left = len(found.rows) - len(shown)
    more = f", {left} more with --all" if left else ""
    terminal.print_line(f"{len(found.rows)} differ, {found.same} are equal{more}")


@click.command(
    cls=Command,
    short_help="Write a model card for a .kd file.",
    examples=["kilodelta card task.kd --base-model org/name --licence apache-2.0 -o README.md"],
)
@click.argument("file", type=click.Path())
@click.option("-o", "--out", type=click.Path(), help="The file to write; printed by default.")
@click.option("--base-model", default="", help="The base's id on the hub, such as org/name.")
@click.option("--licence", default="", help="The base's licence, such as apache-2.0.")
@click.option("--title", default="", help="The heading; the file's name by default.")
@click.option("--force", is_flag=True, help="Replace OUT.")
@as_json
@with_spinner
def card(
    file: str, out: str | None, force: bool, as_json: bool, **given: str
) -> Callable[[], None]:
    """Write a model card for a .kd FILE: what it is, how good, and how to apply it.

    The front matter is what the Hugging Face hub reads.
    """
    from kilodelta.errors import OutputError
    from kilodelta.files import staging
    from kilodelta.format.inspect import inspect
    from kilodelta.models import locate_delta
    from kilodelta.report.card import card

    text = card(inspect(locate_delta(file)).to_json(), **given)
    if out is None and as_json:
        return lambda: terminal.print_json({"card": text})
    if out is None:
        return lambda: terminal.print_text(text.rstrip("\n"))
    place = Path(out)
    if place.exists() and not force:
        raise OutputError(f"{place} exists already", fix="give a new name, or --force")
    staging.write(place, text.encode("utf-8"))
    if as_json:
        return lambda: terminal.print_json({"out": str(place), "card": text})
    return lambda: terminal.print_facts([("card", str(place))])
