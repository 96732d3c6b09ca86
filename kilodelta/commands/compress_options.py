"""Declare the options that say how a model is compressed, for `compress` and `plan` alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any, TypeVar

import click

from kilodelta.commands.common import threads
from kilodelta.format.methods import TABLE

F = TypeVar("F", bound=Callable[..., Any])

OPTIONS = (
    click.option(
        "--labels", help="Labels or queries, one per line, that embeddings are compared with."
    ),
    click.option(
        "--outputs",
        multiple=True,
        metavar="NAME[=WEIGHT]",
        help="Names or globs of the outputs that count; repeat. All, equally, by default.",
    ),
    click.option(
        "--classes",
        multiple=True,
        metavar="NAME=AXIS",
        help="The axis of an output that holds classes; repeat. By default its name tells.",
    ),
    click.option(
        "--method", type=click.Choice(tuple(TABLE)), help="Instead of the budget's choice."
    ),
    click.option("--bits", type=click.Choice(["4", "8", "16"]), help="Bits of a coefficient."),
    click.option("--targets", multiple=True, help="Globs of tensors to change; repeat."),
    click.option(
        "--exclude", multiple=True, help="Globs of tensors neither to change nor to store; repeat."
    ),
    click.option(
        "--extras",
        default="auto",
        help="Other changed tensors to store whole: auto, all, none, or PATTERN[,PATTERN].",
    ),
    click.option("--steps", default=800, type=click.IntRange(2), help="Training steps."),
    click.option(
        "--lr",
        type=click.FloatRange(0, min_open=True),
        help="Learning rate; by default one that suits the method.",
    ),
    click.option(
        "--tune",
        type=click.FloatRange(0, min_open=True),
        metavar="MINUTES",
        help="Search for a better learning rate first, by short trainings.",
    ),
    click.option("--batch", default=32, type=click.IntRange(1), help="Inputs per training step."),
    click.option(
        "--held-out", type=click.IntRange(1), help="Inputs to measure on; a tenth, 512 at most."
    ),
    click.option("--max-length", type=click.IntRange(1), help="Cut texts to so many tokens."),
    click.option("--field", default="text", help="The text's key in .jsonl."),
    click.option(
        "--loss-on",
        default="assistant",
        type=click.Choice(["assistant", "all"]),
        help="Of conversations in .jsonl, the tokens that count.",
    ),
    click.option("--limit", type=click.IntRange(1), help="Read at most so many inputs."),
    click.option(
        "--teacher-cache",
        type=click.Path(file_okay=False),
        help="Keep the tuned model's outputs here, for other budgets and methods.",
    ),
    click.option(
        "--baselines",
        help="Other ways to spend the bytes, measured beside the file: svd; lora, which trains as"
        " long again; svd,lora; or none. By default svd for a report or a curve.",
    ),
    click.option("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps."),
    click.option(
        "--dtype",
        default="auto",
        type=click.Choice(["auto", "fp32", "mixed", "mixed-int8", "bf16", "fp16"]),
        help="Type of the frozen base; auto is its own where the device is fast in it, mixed is"
        " fp32 that trains with products in bfloat16, mixed-int8 in 8 bits.",
    ),
    threads,
    click.option(
        "--shard",
        default="auto",
        type=click.Choice(["auto", "always", "never"]),
        help="Under torchrun: each process holds a part of the base; auto on a GPU where it pays.",
    ),
    click.option(
        "--gradient-checkpointing",
        is_flag=True,
        help="Less memory for a third more time: activations are computed twice.",
    ),
    click.option(
        "--seed",
        default=0,
        type=click.IntRange(0, 2**63 - 1),
        help="Of bases, shuffling and held-out inputs.",
    ),
    click.option("--model", help="package.module:function that builds the model."),
)
"""As `--help` lists them."""


def how_to_compress(function: F) -> F:
    """Give a command all of `OPTIONS`."""
    return reduce(lambda command, option: option(command), reversed(OPTIONS), function)
