"""Export a delta as the folder of a PEFT LoRA adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from kilodelta import terminal
from kilodelta.commands.common import Command, as_json, with_dry_run, with_progress

if TYPE_CHECKING:
    from kilodelta.export.peft.adapter import PeftAdapter


@click.command(
    "export-peft",
    cls=Command,
    short_help="Write a .kd file as a PEFT LoRA adapter.",
    examples=[
        "kilodelta export-peft base/ task.kd -o lora/",
        "kilodelta export-peft base/ full-rank.kd -o lora/ --svd 16",
    ],
)
@click.argument("base", type=click.Path())
@click.argument("file", type=click.Path())
@click.option("-o", "--out", required=True, type=click.Path(), help="A new folder.")
@click.option(
    "--dtype",
    default="fp32",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    help="Precision of the factors.",
)
@click.option("--svd", type=click.IntRange(1), help="Truncate every update to this rank.")
@click.option("--prefix", default="", help="Put before module names, such as transformer.")
@click.option("--embedding", "embeddings", multiple=True, help="Glob of Embedding weights; repeat.")
@click.option("--own-ranks", is_flag=True, help="Each target's own rank, by a rank_pattern.")
@click.option("--as-loaded", is_flag=True, help="Name modules as transformers does once loaded.")
@as_json
@with_progress
@with_dry_run
def export_peft(
    base: str, file: str, out: str, dtype: str, as_json: bool, progress: Any, **given: Any
) -> Callable[[], None]:
    """Write a .kd FILE as a PEFT LoRA adapter for its BASE; needs neither torch nor PEFT.

    PeftModel.from_pretrained opens the folder. Full-rank updates need --svd RANK, which says what
    is lost.
    """
    from kilodelta.export.options import SHORT
    from kilodelta.export.peft.adapter import PeftOptions, export_peft

    options = PeftOptions(dtype=SHORT[dtype], **given)
    done = export_peft(base, file, out, options, progress=progress)
    if as_json:
        return lambda: terminal.print_json({**asdict(done), "path": str(done.path)})
    return lambda: _show(done)


def _show(done: PeftAdapter) -> None:
    facts = [
        ("adapter", f"{done.path}, {terminal.size(done.nbytes)}"),
        ("targets", f"{done.targets} modules, rank {done.rank}, {done.dtype}"),
        *(("saved whole", path) for path in done.modules_to_save),
        *(("bias", name) for name in done.biases),
        ("error", f"{done.error:.2e} of the update; {done.worst_error:.2e} in {done.worst}"),
    ]
    terminal.print_facts(facts)
