"""Verify what was made of a delta, and print the results."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from kilodelta import terminal
from kilodelta.commands.common import Command, as_json, config, max_work, threads, with_progress

if TYPE_CHECKING:
    from kilodelta.verify import Verification


@click.command(
    cls=Command,
    short_help="Prove a .kd file, its base, a merged model and an export.",
    examples=[
        "kilodelta verify base/ task.kd merged/",
        "kilodelta verify base/ task.kd merged/ out/ --inputs texts.jsonl --against tuned/",
        "kilodelta verify smollm2/ task.kd out/ --inputs chat.jsonl --generate 64",
    ],
)
@click.argument("base", type=click.Path())
@click.argument("file", type=click.Path())
@click.argument("places", type=click.Path(), nargs=-1, metavar="[MERGED] [OUT]")
@click.option("--inputs", help="Real inputs: .jsonl, .txt, .npz, or package.module:function.")
@click.option("--against", metavar="TUNED", help="Measure agreement with the tuned model.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    help="Where torch computes the float64 reference.",
)
@click.option("--require", default="", help="Fail unless these ran, such as ort,tensorrt.")
@click.option(
    "--report",
    type=click.Path(),
    help="Write the JSON to this file, or a page where it ends in .html.",
)
@click.option("--limit", type=click.IntRange(1), help="Read at most so many inputs.")
@click.option("--max-length", type=click.IntRange(1), help="Cut texts to so many tokens.")
@click.option("--field", default="text", help="The text's key in .jsonl.")
@click.option("--labels", help="Labels, one a line, that two models' embeddings agree about.")
@click.option("--model", help="package.module:function that builds the module.")
@config
@click.option(
    "--generate",
    type=click.IntRange(1),
    metavar="TOKENS",
    help="Let decoders with a cache write after each prompt, and compare the texts.",
)
@click.option("--digests-only", is_flag=True, help="Check an export by its digests, run nothing.")
@max_work
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
    from kilodelta.verify import verify

    names = tuple(name.strip() for name in require.split(",") if name.strip())
    found = verify(base, file, places, require=names, threads=threads, progress=progress, **given)
    return lambda: show(found, as_json=as_json)


def show(found: Verification, *, as_json: bool) -> None:
    """Print what was proved; exit with the failure's code if something was not."""
    if as_json:
        terminal.print_json(found.to_json())
    else:
        print_proof(found)
    exit_with(found)


def exit_with(found: Verification) -> None:
    """Print a verification's failure and exit with its code, if it has one."""
    if found.failure is not None:
        terminal.print_error(found.failure.what, found.failure.fix)
        raise SystemExit(found.failure.exit_code)


def print_proof(found: Verification) -> None:
    """Print the digests that were proved and the tables of outputs compared."""
    proof, export, report = found.proof, found.export, found.report
    rows = [
        ("base proved", proof.base),
        ("result proved", f"{proof.result} ({proof.targets} targets)"),
    ]
    if proof.merged:
        rows.append(("merged proved", proof.merged))
    if export is not None:
        count = sum(len(artefact.files) for artefact in export.artefacts)
        files = "1 file" if count == 1 else f"{count} files"
        rows.append(("export proved", f"{files}, by digest"))
    compared = "not compared; give --inputs for that" if report is None else report.summary()
    rows.append(("outputs", compared))
    terminal.print_facts(rows)
    if report is None:
        return
    for note in report.notes:
        terminal.print_warning(note)
    for table in report.tables():
        print()
        terminal.print_table(table.title, table.columns, table.rows, right=table.right)
