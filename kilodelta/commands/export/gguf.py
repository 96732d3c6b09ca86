"""Export a delta as a LoRA adapter that llama.cpp loads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from kilodelta import terminal
from kilodelta.commands.common import Command, as_json, threads, with_dry_run, with_progress


@click.command(
    "export-gguf",
    cls=Command,
    short_help="Write a .kd file as a GGUF LoRA adapter for llama.cpp.",
    examples=["kilodelta export-gguf smollm2/ task.kd -o lora.gguf"],
)
@click.argument("base", type=click.Path())
@click.argument("file", type=click.Path())
@click.option("-o", "--out", required=True, type=click.Path(), help="The .gguf file to write.")
@click.option(
    "--dtype", default="fp32", type=click.Choice(["fp32", "fp16"]), help="Precision of factors."
)
@click.option("--svd", type=click.IntRange(1), help="Truncate every update to this rank.")
@click.option("--force", is_flag=True, help="Replace OUT.")
@threads
@as_json
@with_progress
@with_dry_run
def export_gguf(
    base: str, file: str, out: str, dtype: str, as_json: bool, progress: Any, **given: Any
) -> Callable[[], None]:
    """Write a .kd FILE as a LoRA adapter in GGUF for its BASE.

    llama.cpp adds it to the base in any quantisation. Known architectures: llama, mistral, qwen2,
    qwen3. Norms, embeddings and whole tensors have no place in such a file and are refused.
    """
    from kilodelta.export.gguf import export_gguf
    from kilodelta.export.options import SHORT

    done = export_gguf(base, file, out, dtype=SHORT[dtype], progress=progress, **given)
    if as_json:
        return lambda: terminal.print_json(done.to_json())
    facts = [
        ("adapter", f"{done.path}, {terminal.size(done.nbytes)}"),
        ("targets", f"{done.targets} matrices of {done.architecture}, rank {done.rank}"),
        ("error", f"{done.error:.2e} of the update"),
    ]
    return lambda: terminal.print_facts(facts)
