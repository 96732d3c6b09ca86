"""Making a delta out of a fine-tuned model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from kilodelta import terminal
from kilodelta.commands.shared import as_json, with_progress
from kilodelta.errors import require

_METHODS = ("nola", "randlora", "lora", "vera", "unilora")


@click.command()
@click.argument("base", type=click.Path())
@click.argument("tuned", type=click.Path())
@click.option("-o", "--out", required=True, type=click.Path(), help="The .kd file to write.")
@click.option(
    "--inputs",
    help="Unlabelled inputs: .jsonl, .txt, .npz, or package.module:function yielding batches.",
)
@click.option("--labels", help="Labels or queries, one a line, that embeddings are compared with.")
@click.option("--budget", help="Bytes of the whole file, such as 20KB (the default).")
@click.option("--method", type=click.Choice(_METHODS), help="Instead of the budget's choice.")
@click.option("--rank", type=click.IntRange(1), help="Rank of the method.")
@click.option("--bases", type=click.IntRange(1), help="Bases of NOLA, or Uni-LoRA's vector.")
@click.option("--bits", type=click.Choice(["4", "8", "16"]), help="Bits of a coefficient.")
@click.option("--targets", multiple=True, help="Globs of tensors to change; repeat.")
@click.option("--exclude", multiple=True, help="Globs of tensors to leave alone; repeat.")
@click.option(
    "--extras",
    default="auto",
    show_default=True,
    help="Other changed tensors to store whole: auto, all, none, or PATTERN[,PATTERN].",
)
@click.option("--steps", default=800, show_default=True, type=click.IntRange(2))
@click.option(
    "--lr",
    type=click.FloatRange(0, min_open=True),
    help="Learning rate; by default one that suits the method.",
)
@click.option("--batch", default=32, show_default=True, type=click.IntRange(1))
@click.option(
    "--held-out", type=click.IntRange(1), help="Inputs to measure on; a tenth, 512 at most."
)
@click.option("--max-length", type=click.IntRange(1), help="Cut texts to so many tokens.")
@click.option("--field", default="text", show_default=True, help="The text's key in .jsonl.")
@click.option("--limit", type=click.IntRange(1), help="Read at most so many inputs.")
@click.option("--min-agreement", type=click.FloatRange(-1, 1), help="Exit 12 if it keeps less.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1))
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
    return lambda: terminal.show_compression(report, as_json=as_json)
