"""Show everything once, on a real model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from kilodelta import terminal
from kilodelta.commands import verify
from kilodelta.commands.common import Command, as_json, with_progress
from kilodelta.errors import require

if TYPE_CHECKING:
    from kilodelta.demo import Demo


@click.command(
    cls=Command,
    short_help="All of it once, on a real model, offline, in minutes.",
    examples=["kilodelta demo", "kilodelta demo -o somewhere/ --seed 7"],
)
@click.option(
    "-o",
    "--out",
    default="kilodelta-demo",
    type=click.Path(),
    help="A new folder, where everything stays.",
)
@click.option(
    "--seed",
    default=0,
    type=click.IntRange(0, 2**63 - 1),
    help="Of the fine-tune and its .kd file.",
)
@as_json
@with_progress
def demo(out: str, seed: int, as_json: bool, progress: Any) -> Callable[[], None]:
    """Fine-tune, compress, merge, export and verify a real model, offline, in minutes.

    Base: all-MiniLM-L6-v2. Task: tell from a docstring which package it is from.
    """
    require("torch", extra="demo", why="run the demo")
    require("transformers", extra="demo", why="run the demo")
    from kilodelta.demo import demo

    done = demo(out, seed=seed, progress=progress)
    return lambda: show(done, as_json=as_json)


def show(done: Demo, *, as_json: bool) -> None:
    """Print each step with its command, what was proved, and bytes beside accuracy."""
    if as_json:
        terminal.print_json(done.to_json())
        verify.exit_with(done.verification)
        return
    for step in done.steps:
        print(f"{step.name} ({step.seconds:.1f} s): {step.said}")
        if step.command:
            print(f"  $ {step.command}")
    print()
    verify.print_proof(done.verification)
    print()
    rows = [
        (row.name, terminal.size(row.nbytes), f"{row.accuracy:.1%}", _bar(row.accuracy))
        for row in done.rows
    ]
    terminal.print_table("Test accuracy", ("model", "bytes", "right", ""), rows, right=(1, 2))
    print(f"\nAll files are in {done.folder}; the commands above run there. Open report.html.")
    verify.exit_with(done.verification)


def _bar(share: float, width: int = 40) -> str:
    return "█" * round(share * width)
