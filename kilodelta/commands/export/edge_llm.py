"""Export a delta as the LoRA side-car of a TensorRT Edge-LLM engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from kilodelta import terminal
from kilodelta.commands.common import Command, as_json, threads, with_dry_run, with_progress


@click.command(
    "export-edge-llm",
    cls=Command,
    short_help="Write a .kd file as a LoRA for TensorRT Edge-LLM.",
    examples=[
        "kilodelta export-edge-llm qwen3/ task.kd -o lora_weights/task --max-rank 64",
        "kilodelta export-edge-llm qwen3/ task.kd -o lora_weights/task --graph lora_model.onnx",
    ],
)
@click.argument("base", type=click.Path())
@click.argument("file", type=click.Path())
@click.option("-o", "--out", required=True, type=click.Path(), help="A new folder.")
@click.option(
    "--max-rank", type=click.IntRange(1), help="The engine's --max-lora-rank; more is refused."
)
@click.option(
    "--graph", type=click.Path(), help="The engine's lora_model.onnx, to compare names with."
)
@click.option("--svd", type=click.IntRange(1), help="Truncate every update to this rank.")
@threads
@as_json
@with_progress
@with_dry_run
def export_edge_llm(
    base: str, file: str, out: str, as_json: bool, progress: Any, **given: Any
) -> Callable[[], None]:
    """Write a .kd FILE as a LoRA of TensorRT Edge-LLM for its BASE, a decoder.

    OUT gets processed_adapter_model.safetensors and config.json, by the names and shapes that its
    documentation gives for them; the runtime itself was not run. What has no LoRA input in an
    engine is refused: embeddings, the output layer, norms, experts, whole tensors.
    """
    from kilodelta.export.edge_llm import export_edge_llm

    done = export_edge_llm(base, file, out, progress=progress, **given)
    if as_json:
        return lambda: terminal.print_json(done.to_json())
    compared = "compared with the graph's" if done.checked else "not compared; see --graph"
    facts = [
        ("adapter", f"{done.weights}, {terminal.size(done.nbytes)}"),
        ("targets", f"{done.targets} matrices, names {compared}"),
        ("rank", f"{done.rank}: --max-lora-rank {done.rank} or more"),
        ("error", f"{done.error:.2e} of the update"),
    ]
    return lambda: terminal.print_facts(facts)
