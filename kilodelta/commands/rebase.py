"""Make the same fine-tune for a quantised copy of its base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from kilodelta import terminal
from kilodelta.commands.common import Command, as_json, threads, with_dry_run, with_progress


@click.command(
    cls=Command,
    short_help="Make a .kd file fit a quantised copy of its base.",
    examples=[
        "kilodelta rebase base-w4a16/ task.kd -o task-w4a16.kd",
        "kilodelta rebase base.gguf task.kd -o task-gguf.kd",
    ],
)
@click.argument("base", type=click.Path())
@click.argument("file", type=click.Path())
@click.option("-o", "--out", required=True, type=click.Path(), help="The .kd file to write.")
@click.option("--name", help="What the base is called; the old name by default.")
@click.option("--force", is_flag=True, help="Replace OUT.")
@threads
@as_json
@with_progress
@with_dry_run
def rebase(
    base: str, file: str, out: str, as_json: bool, progress: Any, **given: Any
) -> Callable[[], None]:
    """Write a .kd FILE anew for a quantised BASE: a folder, a .gguf or an .onnx file.

    The coefficients stay; base and results are stated anew. Weights are found by name. Nothing is
    trained or measured but the share of codes that its merge in the grid changes.
    """
    from kilodelta.merging.rebase import rebase
    from kilodelta.models import locate, locate_delta

    done = rebase(locate(base), locate_delta(file), out, progress=progress, **given)
    if as_json:
        return lambda: terminal.print_json(done.to_json())
    return lambda: _show(done)


def _show(done: Any) -> None:
    share = done.codes_changed / done.codes if done.codes else 1.0
    terminal.print_facts(
        [
            ("file", f"{done.path}, {terminal.size(done.nbytes)}"),
            ("base", ", ".join(done.kinds)),
            ("", f"logical root {done.logical_root}"),
            ("in the grid", f"{100 * share:.3g} % of {done.codes} codes change"),
            ("update", f"{done.steps:.3g} steps of the grid on average"),
        ]
    )
    from kilodelta.merging.in_grid import MIN_CHANGED

    if share < MIN_CHANGED:
        terminal.print_warning(
            "almost no code changes: merge refuses this file without --min-changed; apply it"
            " beside the base"
        )
    if done.others:
        shown = ", ".join(done.others[:3])
        terminal.print_warning(
            f"{len(done.others)} tensors that are not quantised are not the float base's ({shown}):"
            " if a quantiser folded scales into them, as AWQ and SmoothQuant do, the update does"
            " not fit; test the merged model, or compress against this base"
        )
