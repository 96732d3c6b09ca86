"""Making a delta out of a fine-tuned model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from kilodelta import terminal
from kilodelta.commands.shared import Command, as_json, with_progress
from kilodelta.errors import require
from kilodelta.format.methods import TABLE

if TYPE_CHECKING:
    from kilodelta.compress.distill.report import Report


@click.command(
    cls=Command,
    short_help="Distil a fine-tuned model into a .kd file over its base.",
    examples=[
        "kilodelta compress base/ tuned/ -o task.kd --inputs texts.jsonl --budget 20KB",
        "kilodelta compress base/ tuned/ -o task.kd --method lora --rank 4",
    ],
)
@click.argument("base", type=click.Path())
@click.argument("tuned", type=click.Path())
@click.option("-o", "--out", required=True, type=click.Path(), help="The .kd file to write.")
@click.option(
    "--inputs",
    help="Unlabelled inputs: .jsonl, .txt, .npz, or package.module:function yielding batches.",
)
@click.option("--labels", help="Labels or queries, one a line, that embeddings are compared with.")
@click.option("--budget", help="Bytes of the whole file, such as 20KB (the default).")
@click.option("--method", type=click.Choice(tuple(TABLE)), help="Instead of the budget's choice.")
@click.option("--rank", type=click.IntRange(1), help="Rank of the method.")
@click.option("--bases", type=click.IntRange(1), help="Bases of NOLA, or Uni-LoRA's vector.")
@click.option("--bits", type=click.Choice(["4", "8", "16"]), help="Bits of a coefficient.")
@click.option("--targets", multiple=True, help="Globs of tensors to change; repeat.")
@click.option("--exclude", multiple=True, help="Globs of tensors to leave alone; repeat.")
@click.option(
    "--extras",
    default="auto",
    help="Other changed tensors to store whole: auto, all, none, or PATTERN[,PATTERN].",
)
@click.option("--steps", default=800, type=click.IntRange(2), help="Training steps.")
@click.option(
    "--lr",
    type=click.FloatRange(0, min_open=True),
    help="Learning rate; by default one that suits the method.",
)
@click.option("--batch", default=32, type=click.IntRange(1), help="Inputs per training step.")
@click.option(
    "--held-out", type=click.IntRange(1), help="Inputs to measure on; a tenth, 512 at most."
)
@click.option("--max-length", type=click.IntRange(1), help="Cut texts to so many tokens.")
@click.option("--field", default="text", help="The text's key in .jsonl.")
@click.option("--limit", type=click.IntRange(1), help="Read at most so many inputs.")
@click.option("--min-agreement", type=click.FloatRange(-1, 1), help="Exit 12 if it keeps less.")
@click.option(
    "--seed",
    default=0,
    type=click.IntRange(0, 2**63 - 1),
    help="Of bases, shuffling and held-out inputs.",
)
@click.option("--name", default="", help="What the base is called; its folder's name by default.")
@click.option("--model", help="package.module:function that builds the model.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run.")
@as_json
@with_progress
def compress(
    base: str, tuned: str, out: str, resume: bool, as_json: bool, progress: Any, **given: Any
) -> Callable[[], None]:
    """Distil a TUNED model into a .kd file of kilobytes over its BASE.

    Without --inputs only --method lora is possible: a truncated SVD of the change.
    """
    require("torch", extra="hf", why="train a delta's coefficients")
    from kilodelta.compress.distill.compress import compress, options_from

    inputs = given.pop("inputs")
    options = options_from(**given)
    report = compress(
        base, tuned, out, inputs=inputs, options=options, resume=resume, progress=progress
    )
    return lambda: show(report, as_json=as_json)


def show(report: Report, *, as_json: bool) -> None:
    """Print what a compression kept and what it cost."""
    if as_json:
        terminal.print_json(report.to_json())
        return
    options = ", ".join(f"{k} {v}" for k, v in report.method.items() if k != "name")
    whole = report.nbytes["file"]
    times = report.tuned_bytes / whole
    rows: list[tuple[str, object]] = [
        (
            "file",
            f"{report.path}, {terminal.size(whole)}: {times:,.0f}x smaller",
        ),
        ("method", f"{report.method['name']}: {options}, {report.bits} bits"),
        ("targets", f"{report.targets} tensors"),
        *(("extra", name) for name in report.extras),
    ]
    if report.after is not None and report.before is not None:
        rows += [
            (
                f"{report.kind}",
                f"{report.after.agreement:.4f} with the tuned model on "
                f"{report.held_out} held-out inputs; the base alone {report.before.agreement:.4f}",
            ),
            (
                "divergence",
                f"{report.after.divergence:.4f}, the base's {report.before.divergence:.4f}",
            ),
        ]
    rows += [
        ("weights", f"error {report.weight_error:.3f} of the change (1 is the base's)"),
        (
            "time",
            f"{report.seconds:.0f} s, {report.steps} steps"
            + (", interrupted: the best state so far" if report.interrupted else ""),
        ),
        *(("bytes", f"{count:>9}  {part}") for part, count in report.nbytes.items()),
    ]
    if report.dropped:
        names = ", ".join(change.name for change in report.dropped[:3])
        rows.append(
            (
                "not stored",
                f"{len(report.dropped)} changed tensors with "
                f"{report.dropped_energy:.1%} of the change ({names}, ...); see --extras",
            )
        )
    terminal.print_facts([*rows, ("result", report.result)])
