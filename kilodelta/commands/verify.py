"""Proving: digests, and what artefacts compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from kilodelta import terminal
from kilodelta.commands.shared import as_json, threads, with_progress


@click.command()
@click.argument("base", type=click.Path())
@click.argument("file", type=click.Path())
@click.argument("places", type=click.Path(), nargs=-1, metavar="[MERGED] [OUT]")
@click.option("--inputs", help="Real inputs: .jsonl, .txt, .npz, or package.module:function.")
@click.option("--against", metavar="TUNED", help="Measure agreement with the tuned model.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where torch computes the float64 reference.",
)
@click.option("--require", default="", help="Fail unless these ran, such as ort,tensorrt.")
@click.option("--report", type=click.Path(), help="Write the JSON to this file too.")
@click.option("--limit", type=click.IntRange(1), help="Read at most so many inputs.")
@click.option("--max-length", type=click.IntRange(1), help="Cut texts to so many tokens.")
@click.option("--field", default="text", show_default=True, help="The text's key in .jsonl.")
@click.option("--labels", help="Labels, one a line, that two models' embeddings agree about.")
@click.option("--model", help="package.module:function that builds the module.")
@click.option("--config", type=click.Path(), help="Folder with the tuned model's config.json.")
@click.option("--digests-only", is_flag=True, help="Check an export by its digests, run nothing.")
@threads
@as_json
@with_progress
def verify(
    base: str,
    file: str,
    places: tuple[str, ...],
    require: str,
    threads: int | None,
    as_json: bool,
    progress: Any,
    **given: Any,
) -> Callable[[], None]:
    """Prove BASE and .kd FILE, a MERGED model, and an export folder OUT; exit 0 only if all hold.

    Every byte is read. With --inputs, everything in OUT is run and held against a float64
    reference, and has to show the fine-tune's own effect.
    """
    from kilodelta.verify.verification import Options, verify

    names = tuple(name.strip() for name in require.split(",") if name.strip())
    options = Options(require=names, **given)
    found = verify(base, file, places, options=options, threads=threads, progress=progress)
    return lambda: terminal.show_verification(found, as_json=as_json)
