"""Import what other tools trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from kilodelta import terminal
from kilodelta.commands import compress
from kilodelta.commands.common import Command, as_json, with_dry_run, with_progress
from kilodelta.errors import require
from kilodelta.format.methods import TABLE


@click.command(
    "import",
    cls=Command,
    short_help="Turn an adapter of PEFT or of official NOLA into a .kd file.",
    examples=[
        "kilodelta import adapter/ --base base/ -o task.kd",
        "kilodelta import adapter/ --base base/ -o task.kd --requantise --inputs texts.jsonl",
    ],
)
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
@click.option("--alpha", type=float, help="Official NOLA's alpha, where its file does not say.")
@click.option(
    "--drawn-on", type=click.Choice(["cpu"]), help="Where official NOLA's bases were drawn."
)
@click.option(
    "--factors",
    default="",
    type=click.Path(),
    help="Official NOLA's factors as a .safetensors file, where its bases were drawn on a GPU.",
)
@click.option("--name", default="", help="What the base is called; its folder's name by default.")
@click.option(
    "--prefix",
    default="",
    help="Where in the base its modules lie, if they fit in several places: a module path to put"
    " before theirs, or OLD=NEW to replace a front.",
)
@click.option(
    "--requantise",
    is_flag=True,
    help="Into an exact integer method: a LoRA by truncated SVD, or with --inputs by distillation.",
)
@click.option("--method", type=click.Choice(tuple(TABLE)), help="Of --requantise: what it becomes.")
@click.option("--rank", type=click.IntRange(1), help="Of --requantise: rank of the method.")
@click.option("--bases", type=click.IntRange(1), help="Of --requantise: as for kilodelta compress.")
@click.option("--inputs", help="Of --requantise: unlabelled inputs, as for kilodelta compress.")
@click.option("--steps", type=click.IntRange(2), help="Of --requantise --inputs: training steps.")
@click.option(
    "--model", help="Of --requantise --inputs: package.module:function that builds the model."
)
@click.option("--force", is_flag=True, help="Replace a .kd file that is there.")
@as_json
@with_progress
@with_dry_run
def import_adapter(
    adapter: str, base: str, out: str, as_json: bool, progress: Any, **options: Any
) -> Callable[[], None]:
    """Turn an ADAPTER of HF PEFT or of the official NOLA code into a .kd file."""
    require("torch", extra="hf", why="import an adapter")
    from kilodelta.compress.adapters import importing

    options["bits"] = int(options["bits"])
    done = importing.import_adapter(adapter, base, out, progress=progress, **options)
    if done.report is not None:
        report = done.report
        return lambda: compress.show(report, as_json=as_json)
    return lambda: _show(done, as_json=as_json)


def _show(done: Any, *, as_json: bool) -> None:
    if as_json:
        terminal.print_json(done.to_json())
        return
    settings = ", ".join(f"{k} {v}" for k, v in done.method.items() if k != "name")
    whole = done.nbytes["file"]
    terminal.print_facts(
        [
            ("file", f"{done.path}, {terminal.size(whole)}"),
            ("source", f"{done.source}, {terminal.size(done.adapter_bytes)}"),
            ("method", f"{done.method['name']}: {settings}"),
            ("targets", f"{done.targets} tensors"),
            *(("extra", name) for name in done.extras),
            ("error", f"{done.error:.2e} of the adapter's update"),
            *(("bytes", f"{count:>9}  {part}") for part, count in done.nbytes.items()),
            *(("note", note) for note in done.notes),
            ("result", done.result),
        ]
    )
