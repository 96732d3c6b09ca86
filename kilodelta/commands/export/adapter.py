"""Export a delta as ONNX Runtime's own adapter files beside one graph of the base."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from kilodelta import terminal
from kilodelta.commands.common import Command, as_json, with_dry_run, with_progress

if TYPE_CHECKING:
    from kilodelta.export.adapter.folder import AdapterFolder


@click.command(
    "export-adapter",
    cls=Command,
    short_help="Write a .kd file as an ONNX Runtime adapter beside its base.",
    examples=[
        "kilodelta export-adapter base/ task.kd -o out/ --rank 8",
        "kilodelta export-adapter base/ other.kd -o out/",
    ],
)
@click.argument("base", type=click.Path())
@click.argument("file", type=click.Path())
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(),
    help="A new folder, or one that this command made for the same base.",
)
@click.option(
    "--dtype",
    default="fp32",
    type=click.Choice(["fp32", "fp16"]),
    help="Precision of the graph and the factors.",
)
@click.option("--rank", type=click.IntRange(1), default=8, help="Highest rank of a file.")
@click.option(
    "--targets", multiple=True, help="Glob of weights to expose; repeat. All layers by default."
)
@click.option(
    "--whole", multiple=True, help="Glob of base tensors that files may store whole; repeat."
)
@click.option(
    "--config",
    help="The tuned model's folder, its config.json, or a .kd file: the head to export; by default"
    " FILE's own.",
)
@click.option("--model", help="package.module:function that builds the module.")
@click.option("--inputs", help="A batch to trace with: .npz, .jsonl, .txt or module:function.")
@as_json
@with_progress
@with_dry_run
def export_adapter(
    base: str,
    file: str,
    out: str,
    dtype: str,
    rank: int,
    targets: tuple[str, ...],
    whole: tuple[str, ...],
    config: str | None,
    model: str | None,
    inputs: str | None,
    as_json: bool,
    progress: Any,
) -> Callable[[], None]:
    """Write a .kd FILE as an .onnx_adapter file beside the ONNX graph of its BASE.

    The first call makes the graph, which --dtype, --rank, --targets, --whole, --config, --model and
    --inputs describe; each further file into the same OUT adds one adapter and needs no torch.
    """
    from kilodelta.export.adapter.folder import AdapterOptions, export_adapter
    from kilodelta.export.options import SHORT

    options = AdapterOptions(
        dtype=SHORT[dtype],
        rank=rank,
        include=targets,
        whole=whole,
        config=config,
        model=model,
        inputs=inputs,
    )
    done = export_adapter(base, file, out, options, progress=progress)
    if as_json:
        return lambda: terminal.print_json(dict(done.to_json()))
    return lambda: _show(done)


def _show(done: AdapterFolder) -> None:
    graph = "new" if done.is_new else "as it was"
    terminal.print_facts(
        [
            ("adapter", f"{done.path / done.adapter}, {terminal.size(done.nbytes)}"),
            ("graph", f"{graph}, rank up to {done.rank}, {done.dtype}"),
        ]
    )
