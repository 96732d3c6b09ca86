"""Bringing in what other tools trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from kilodelta import terminal
from kilodelta.commands.shared import as_json, with_progress


@click.command("import")
@click.argument("adapter", type=click.Path())
@click.option("--base", required=True, type=click.Path(), help="The model it was trained on.")
@click.option("-o", "--out", required=True, type=click.Path(), help="The .kd file to write.")
@click.option(
    "--bits", type=click.Choice(["4", "8", "16"]), default="8", help="Bits of a coefficient."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    help="Type of the coefficients of a compatibility form.",
)
@click.option(
    "--basis-dtype",
    type=click.Choice(["bfloat16", "float16"]),
    help="Type in which PEFT drew its basis, where the adapter does not hold it.",
)
@click.option("--name", default="", help="What the base is called; its folder's name by default.")
@as_json
@with_progress
def bring(
    adapter: str, base: str, out: str, bits: str, as_json: bool, progress: Any, **given: Any
) -> Callable[[], None]:
    """Turn an ADAPTER of HF PEFT or of the official NOLA code into a .kd file."""
    from kilodelta.compress.adapters.bring import bring
    from kilodelta.compress.adapters.options import Options

    options = Options(bits=int(bits), **given)
    done = bring(adapter, base, out, options=options, progress=progress)

    def show() -> None:
        if as_json:
            terminal.print_json(done.to_json())
            return
        settings = ", ".join(f"{k} {v}" for k, v in done.method.items() if k != "name")
        whole = done.nbytes["file"]
        times = f"{done.adapter_bytes / whole:,.1f}x smaller than the adapter"
        terminal.print_facts(
            [
                ("file", f"{done.path}, {terminal.size(whole)}: {times}"),
                ("source", done.source),
                ("method", f"{done.method['name']}: {settings}"),
                ("targets", f"{done.targets} tensors"),
                *(("extra", name) for name in done.extras),
                ("error", f"{done.error:.2e} of the adapter's update"),
                *(("bytes", f"{count:>9}  {part}") for part, count in done.nbytes.items()),
                *(("note", note) for note in done.notes),
                ("result", done.result),
            ]
        )

    return show
