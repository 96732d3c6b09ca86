"""Say what a compression takes, and draw its curve of size against fidelity."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from kilodelta import terminal
from kilodelta.commands.common import Command, as_json, with_progress
from kilodelta.commands.compress import INTERRUPTED
from kilodelta.commands.compress_options import how_to_compress
from kilodelta.errors import InputError, require

if TYPE_CHECKING:
    from kilodelta.compress.distill.planning.plan import Planned


@click.command(
    cls=Command,
    short_help="Say what a compression takes; draw size against fidelity.",
    examples=[
        "kilodelta plan base/ tuned/ --inputs texts.jsonl",
        "kilodelta plan base/ tuned/ --inputs texts.jsonl --curve 4KB,12KB,50KB -o curve/",
    ],
)
@click.argument("base", type=click.Path())
@click.argument("tuned", type=click.Path())
@click.option(
    "--inputs",
    required=True,
    help="Unlabelled inputs: .jsonl, .txt, .npz, or package.module:function yielding batches.",
)
@click.option("--curve", help="Compress at these budgets, such as 4KB,12KB,50KB.")
@click.option(
    "-o",
    "--out",
    default="curve",
    type=click.Path(file_okay=False),
    help="The curve's folder: a file per budget, curve.json, curve.svg.",
)
@click.option("--budget", help="Without --curve: bytes of the file to plan for, 20KB by default.")
@how_to_compress
@click.option(
    "--processes",
    default=1,
    type=click.IntRange(1),
    help="Estimate for each of so many processes of torchrun; see --shard.",
)
@click.option("--force", is_flag=True, help="Begin a curve anew.")
@click.option("--resume", is_flag=True, help="Go on with a curve that was interrupted.")
@as_json
@with_progress
def plan(
    base: str,
    tuned: str,
    inputs: str,
    curve: str | None,
    out: str,
    processes: int,
    force: bool,
    resume: bool,
    as_json: bool,
    progress: Any,
    **given: Any,
) -> Callable[[], None]:
    """Estimate peak memory, seconds per step, disk and the total of compressing a TUNED model.

    A few real steps are taken on coefficients that are thrown away; nothing is written. With
    --curve the estimate is said first; then every budget is compressed over one cache of the tuned
    model's outputs.
    """
    from kilodelta.compress.distill.options import check, options_from

    if curve is None:
        _refuse_a_curve_s()
    options = options_from(**given)
    check(options, learns=True)  # a slip is answered before torch is imported
    require("torch", extra="hf", why="train a delta's coefficients")
    from kilodelta.compress.distill.planning.plan import plan

    made = plan(
        base,
        tuned,
        inputs=inputs,
        out=out,
        curve=curve,
        options=options,
        processes=processes,
        force=force,
        resume=resume,
        announce=None if as_json else _warn,
        progress=progress,
    )
    return lambda: _end(made, as_json=as_json)


def _refuse_a_curve_s() -> None:
    """Refuse options that say where a curve lies where none was asked for.

    Raises:
        InputError: one was typed; ignored, it would seem to have written something.
    """
    context = click.get_current_context()
    for name, spelled in (("out", "-o"), ("force", "--force"), ("resume", "--resume")):
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise InputError(
                f"{spelled} belongs to --curve: a plan alone writes nothing",
                fix="leave it away, or add --curve 4KB,12KB",
            )


def _warn(planned: Planned) -> None:
    """Say on stderr, before the first budget, what it all takes."""
    for warning in planned.estimate.warnings():
        terminal.print_warning(warning)
    if planned.budgets:
        count = len(planned.budgets)
        terminal.print_note(f"{count} budgets take about {minutes(planned.total_seconds)}")


def _end(planned: Planned, *, as_json: bool) -> None:
    show(planned, as_json=as_json)
    if planned.curve is not None and planned.curve.interrupted:
        raise SystemExit(INTERRUPTED)


def show(planned: Planned, *, as_json: bool) -> None:
    """Print an estimate and the points of a curve."""
    if as_json:
        terminal.print_json(planned.to_json())
        return
    estimate = planned.estimate
    free = estimate.available_bytes
    each = "" if estimate.processes == 1 else f" in each of {estimate.processes} processes"
    part = ", a part of the base" if estimate.sharded else ""
    place = "on disk" if estimate.teacher_on_disk else "in memory"
    terminal.print_facts(
        [
            (
                "memory",
                f"{terminal.size(estimate.peak_bytes)} at the peak{each}"
                + ("" if free is None else f", {terminal.size(free)} are free"),
            ),
            ("weights", f"{terminal.size(estimate.weights_bytes)}{part}"),
            ("activations", f"{terminal.size(estimate.activations_bytes)} of the longest batch"),
            ("teacher", f"{terminal.size(estimate.teacher_bytes)} {place}"),
            *(
                ("shortened", f"{name}: the {k} most likely classes and the rest's mass")
                for name, k in estimate.shortened.items()
            ),
            ("coefficients", f"{estimate.coefficients:,}"),
            (
                "time",
                f"{minutes(planned.total_seconds)}: {minutes(estimate.teacher_seconds)} for the"
                f" tuned model's outputs, {estimate.steps} steps of {estimate.step_seconds:.3g} s"
                + (f" in {estimate.dtype}" if estimate.dtype else "")
                + (f", for each of {len(planned.budgets)} budgets" if planned.budgets else "")
                + ("; what processes exchange comes on top" if each else ""),
            ),
        ]
    )
    if planned.curve is not None and planned.curve.points:
        _show_curve(planned)


def _show_curve(planned: Planned) -> None:
    curve = planned.curve
    assert curve is not None  # the caller has looked
    terminal.print_facts(
        [
            ("bytes", f"agreement ({curve.kind}); the base alone {curve.base_agreement:.4f}"),
            *(
                (
                    f"{point.nbytes:,}",
                    f"{point.agreement:.4f}  {curve.folder / point.file}"
                    f"  {point.name}, {point.bits} bits",
                )
                for point in curve.points
            ),
            *(
                (f"{size.nbytes:,}", f"{size.agreement:.4f}  {size.name}, {size.how}")
                for size in curve.beside
            ),
            ("picture", curve.folder / "curve.svg"),
        ]
    )


def minutes(seconds: float) -> str:
    """Return a time as a person reads it.

    Example:
        >>> minutes(4.2), minutes(200), minutes(9000)
        ('4 s', '3.3 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
