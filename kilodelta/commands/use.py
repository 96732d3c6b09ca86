"""Using a delta: merged with its base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import click

from kilodelta import terminal
from kilodelta.commands.shared import as_json, threads, with_progress


@click.command()
@click.argument("base", type=click.Path())
@click.argument("file", type=click.Path())
@click.option(
    "-o", "--out", required=True, type=click.Path(), help="A new folder, or NAME.safetensors."
)
@threads
@as_json
@with_progress
def merge(
    base: str, file: str, out: str, threads: int | None, as_json: bool, progress: Any
) -> Callable[[], None]:
    """Merge a .kd FILE into its BASE; the result's digest is proved while it is written."""
    from kilodelta.export.merge import merge

    done = merge(base, file, out, threads=threads, progress=progress)

    def show() -> None:
        if as_json:
            terminal.print_json({**asdict(done), "path": str(done.path)})
            return
        print(
            f"{done.path}: {done.targets} tensors merged, {done.extras} stored whole, "
            f"{done.copied} copied, {terminal.size(done.nbytes)}"
        )
        print(f"result proved: {done.result}")
        if done.left_out:
            print(f"left out, the base's weights in other forms: {' '.join(done.left_out)}")

    return show
