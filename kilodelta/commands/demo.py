"""Showing everything at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from kilodelta import terminal
from kilodelta.commands.shared import as_json, with_progress
from kilodelta.errors import require


@click.command()
@click.option(
    "-o",
    "--out",
    default="kilodelta-demo",
    show_default=True,
    type=click.Path(),
    help="A new folder, where everything stays.",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1))
@as_json
@with_progress
def demo(out: str, seed: int, as_json: bool, progress: Any) -> Callable[[], None]:
    """Fine-tune, compress, merge, export and verify a real model, offline, in minutes.

    Base: all-MiniLM-L6-v2. Task: tell from a docstring which package it is from.
    """
    require("torch", extra="demo", why="run the demo")
    require("transformers", extra="demo", why="run the demo")
    from kilodelta.demo.run import demo

    done = demo(Path(out), seed=seed, progress=progress)
    return lambda: terminal.show_demo(done, as_json=as_json)
