"""Merge a delta with its base, or export the merged model as ONNX or a TensorRT engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from kilodelta import terminal
from kilodelta.commands.common import (
    Command,
    as_json,
    config,
    flavour,
    max_work,
    outputs,
    threads,
    with_dry_run,
    with_progress,
)
from kilodelta.commands.export.ports import describe_ports
from kilodelta.errors import InputError, require

if TYPE_CHECKING:
    from kilodelta.export.manifest.facts import Artefact
    from kilodelta.export.merge.checkpoint import Merged
    from kilodelta.export.pipeline import Exported


min_changed = click.option(
    "--min-changed",
    default=0.01,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="Of a quantised base: the share of codes that has to change.",
)


@click.command(
    cls=Command,
    short_help="Merge a .kd file into its base, and prove the result.",
    examples=[
        "kilodelta merge base/ task.kd -o merged/",
        "kilodelta merge base.safetensors task.kd -o merged.safetensors --threads 4",
    ],
)
@click.argument("base", type=click.Path())
@click.argument("file", type=click.Path())
@click.option(
    "-o", "--out", required=True, type=click.Path(), help="A new folder, or NAME.safetensors."
)
@click.option(
    "--config",
    type=click.Path(),
    help="The tuned model's folder or config.json; else the base's with what FILE says of it.",
)
@click.option("--device", default="cpu", help="cpu, cuda, or cuda:N.")
@max_work
@min_changed
@threads
@as_json
@with_progress
@with_dry_run
def merge(
    base: str,
    file: str,
    out: str,
    config: str | None,
    as_json: bool,
    progress: Any,
    **given: Any,
) -> Callable[[], None]:
    """Merge a .kd FILE into its BASE: every tensor is proved while it is written.

    A folder keeps the base's sharding, tokenizer and further files; weights in other forms, and
    links that leave the folder, are not copied, and named. A quantised BASE (a folder or a .gguf
    file) keeps its layout and scales and gets new codes.
    """
    from kilodelta.export.merge.checkpoint import merge

    done = merge(base, file, out, config=config, progress=progress, **given)
    if as_json:
        return lambda: terminal.print_json({**asdict(done), "path": str(done.path)})
    return lambda: _show_merge(done)


def _show_merge(done: Merged) -> None:
    terminal.print_line(
        f"{done.path}: {done.targets} tensors merged, {done.extras} stored whole, "
        f"{done.copied} copied, {terminal.size(done.nbytes)}"
    )
    terminal.print_line(f"result proved: {done.result}")
    if done.codes:
        share = 100 * done.codes_changed / done.codes
        counts = f"{done.codes_changed} of {done.codes} codes changed ({share:.3g} %)"
        terminal.print_line(f"in the grid: {counts}")
    if done.still:
        terminal.print_warning(f"{done.still} weights have a step of zero and stay as they are")
    for why in dict.fromkeys(done.left_out.values()):
        names = [name for name, reason in done.left_out.items() if reason == why]
        terminal.print_line(f"left out, {why}: {' '.join(names)}")
    if done.new and done.config == "base":
        terminal.print_warning(
            f"the file brings {', '.join(done.new[:5])}, which the base's config.json does not "
            "know; --config TUNED takes the tuned model's"
        )


_MOVED = {"--peft": "export-peft", "--adapter": "export-adapter", "--gguf": "export-gguf"}
"""Flags of `export` in version 0.1 that are commands now, and one that is written like them."""


class _Export(Command):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Answer the old spelling by the new one, before its other options are looked at."""
        for flag, command in _MOVED.items():
            if flag in args:
                raise InputError(
                    f"export {flag} is a command", fix=f"kilodelta {command} BASE FILE -o OUT"
                )
        return super().parse_args(ctx, args)


@click.command(
    cls=_Export,
    short_help="Write ONNX files and engines with a .kd file merged in.",
    examples=[
        "kilodelta export base/ task.kd -o out/ --dtype fp16",
        "kilodelta export base/ task.kd -o out/ --onnx --tensorrt sm86,sm89 --profile batch=1,8,32",
        "kilodelta export smollm2/ task.kd -o out/ --onnx --kv-cache",
        "kilodelta export base-int4/ task.kd -o out/ --tensorrt sm89 --onnx",
    ],
)
@click.argument("base", type=click.Path())
@click.argument("file", type=click.Path())
@click.option("-o", "--out", required=True, type=click.Path(), help="A new folder.")
@click.option("--onnx", is_flag=True, help="Keep the ONNX files; the default without --tensorrt.")
@click.option("--tensorrt", metavar="SM[,SM]", help="Build engines for GPUs such as sm86,sm89.")
@click.option(
    "--dtype",
    multiple=True,
    default=["fp32"],
    type=click.Choice(["fp32", "fp16", "bf16"]),
    help="Precision of weights and arithmetic; repeat for several.",
)
@click.option("--external-data", is_flag=True, help="Weights beside the ONNX file, not in it.")
@flavour
@click.option(
    "--profile",
    multiple=True,
    metavar="AXIS=MIN,OPT,MAX",
    help="Sizes of an axis, such as batch=1,8,32, sequence=1,64,256, time=50,200,800 or "
    "height=224,224,448; repeat.",
)
@click.option("--tf32", is_flag=True, help="Let engines take float32 products in TF32.")
@click.option("--refittable", is_flag=True, help="Engines whose changed weights can be exchanged.")
@click.option("--model", help="package.module:function that builds the module.")
@config
@click.option("--inputs", help="A batch to trace with: .npz, .jsonl, .txt or module:function.")
@outputs
@click.option(
    "--kv-cache",
    is_flag=True,
    help="A decoder's cache as inputs and outputs; of a language model, with ONNX Runtime GenAI's "
    "files.",
)
@click.option(
    "--triton",
    metavar="REPOSITORY",
    help="Also serve it: the next version in this Triton model repository.",
)
@click.option(
    "--blocks",
    default="auto",
    type=click.Choice(["auto", "matmulnbits", "qdq"]),
    help="Of a quantised base: the ONNX operators that hold its codes.",
)
@min_changed
@max_work
@click.option("--force", is_flag=True, help="Replace an earlier export.")
@click.option("--report", type=click.Path(), help="Write what was made as an HTML page as well.")
@as_json
@with_progress
@with_dry_run
def export(
    base: str,
    file: str,
    out: str,
    tensorrt: str | None,
    as_json: bool,
    progress: Any,
    **given: Any,
) -> Callable[[], None]:
    """Export BASE with a .kd FILE merged in: ONNX files, TensorRT engines, and a manifest.

    The merge is proved first, and every graph is run at other sizes than it was traced at. OUT
    appears when everything is there, or not at all. A quantised BASE (a folder) is merged in its
    grid, and the graphs hold its codes.
    """
    require("torch", extra="onnx", why="export models")
    from kilodelta.export import export

    gpus = tensorrt.split(",") if tensorrt is not None else ()
    done = export(base, file, out, tensorrt=gpus, progress=progress, **given)
    if as_json:
        return lambda: terminal.print_json(done.to_json())
    return lambda: _show_export(done)


def _show_export(done: Exported) -> None:
    rows = [
        (
            artefact.file,
            artefact.dtype,
            terminal.size(sum(file.nbytes for file in artefact.files)),
            f"{done.seconds[artefact.file]:.1f} s",
            _made_for(artefact),
        )
        for artefact in done.manifest.artefacts
    ]
    columns = ("file", "precision", "size", "made in", "for")
    terminal.print_table(str(done.path), columns, rows, right=(2, 3))
    graphs = {artefact.inputs: artefact for artefact in reversed(done.manifest.artefacts)}
    facts = [
        (f"{kind}{f' of {one.file}' if len(graphs) > 1 else ''}", describe_ports(ports))
        for one in reversed(graphs.values())
        for kind, ports in (("inputs", one.inputs), ("outputs", one.outputs))
    ]
    facts += [
        ("result proved", done.manifest.result_root),
        *(("note", note) for note in done.notes),
    ]
    if done.not_kept:
        facts.append(("not kept", f"{', '.join(done.not_kept)}; --onnx keeps them"))
    if done.triton is not None:
        models = ", ".join(f"{model.name}/{model.version}" for model in done.triton.models)
        facts.append((f"Triton, {done.triton.path}", models))
        facts += [("not for Triton", reason) for reason in done.triton.left_out]
    terminal.print_facts(facts)


def _made_for(artefact: Artefact) -> str:
    """Say the GPUs of an engine, and the shapes: one where all inputs have the same."""
    shapes = ["..".join("x".join(map(str, p)) for p in ps) for ps in artefact.profile.values()]
    engine = artefact.engine
    runs_on = "" if engine is None else f"{engine.flavour} {','.join(engine.capabilities)} "
    return runs_on + " ".join(dict.fromkeys(shapes))
