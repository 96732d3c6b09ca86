"""Make what goes to devices: the device folder, once, and the releases for it."""

from __future__ import annotations

from collections.abc import Callable
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
    with_dry_run,
    with_progress,
)
from kilodelta.commands.trust import key_password

if TYPE_CHECKING:
    from kilodelta.device import Bundle, Released


@click.command(
    cls=Command,
    short_help="Make a device folder from a base, once, on a build machine.",
    examples=[
        "kilodelta bundle base/ -o device/ --mode adapter --probe texts.jsonl",
        "kilodelta bundle base/ -o device/ --mode adapter --engine sm86,sm89 --dtype fp16",
        "kilodelta bundle base/ -o device/ --mode patch --keep 2",
        "kilodelta bundle base/ -o device/ --mode patch --engine sm86 --dtype fp16",
        "kilodelta bundle base-w4a16/ -o device/ --mode patch --probe texts.jsonl",
    ],
)
@click.argument("base", type=click.Path())
@click.option("-o", "--out", required=True, type=click.Path(), help="A new folder.")
@click.option(
    "--mode",
    required=True,
    type=click.Choice(["adapter", "patch", "refit"]),
    help="How fine-tunes are applied.",
)
@click.option("--onnx", is_flag=True, help="Keep the ONNX file that an engine is built from.")
@click.option("--engine", metavar="SM[,SM]", help="Run in TensorRT, on GPUs such as sm89.")
@flavour
@click.option(
    "--provider",
    default="cpu",
    type=click.Choice(["cpu", "cuda"]),
    help="Where ONNX Runtime runs.",
)
@click.option(
    "--dtype",
    default="fp32",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    help="Precision of weights and arithmetic.",
)
@click.option(
    "--rank",
    default=8,
    type=click.IntRange(1),
    help="Adapter mode: the highest rank that a fine-tune may have.",
)
@click.option(
    "--slots",
    default=0,
    type=click.IntRange(0),
    help="Adapter mode: how many fine-tunes one batch may mix.",
)
@click.option(
    "--targets",
    multiple=True,
    help="Glob of tensors that fine-tunes may change; repeat. All layers by default.",
)
@click.option("--exclude", multiple=True, help="Glob of tensors that they may not change; repeat.")
@click.option(
    "--whole",
    multiple=True,
    help="Adapter mode: glob of tensors of BASE that fine-tunes may store whole; repeat.",
)
@click.option(
    "--config",
    help="For fine-tunes with a new head: the folder, config.json or .kd file of one of them; by"
    " default the base's own head.",
)
@click.option(
    "--profile",
    multiple=True,
    metavar="AXIS=MIN,OPT,MAX",
    help="Sizes of an axis, such as batch=1,8,32 or height=224,224,448; repeat.",
)
@click.option("--model", help="package.module:function that builds the module.")
@click.option("--name", default="", help="The base's name, for messages; its folder's by default.")
@click.option(
    "--probe", help="Golden inputs: .npz, .jsonl, .txt or package.module:function; else made up."
)
@outputs
@click.option(
    "--blocks",
    default="auto",
    type=click.Choice(["auto", "matmulnbits", "qdq"]),
    help="Of a quantised BASE: the ONNX operators that hold its codes.",
)
@click.option(
    "--keep",
    default=1,
    type=click.IntRange(1, 1000),
    help="Fine-tunes to keep on the disk to go back to.",
)
@click.option(
    "--ceiling",
    type=click.FloatRange(0, 1, min_open=True),
    help="The most that a file's own probe may allow an output to be off, relative; by default "
    "0.01 in fp32, 0.1 in fp16, 0.5 in bf16.",
)
@click.option(
    "--max-jump",
    default=1_000_000,
    type=click.IntRange(1),
    help="How far a version may exceed the highest one that the device has had.",
)
@max_work
@click.option(
    "--trust",
    multiple=True,
    type=click.Path(),
    help="Public key (NAME.pub) of who signs releases; repeat. The device then takes no others.",
)
@click.option(
    "--threshold", default=1, type=click.IntRange(1), help="How many of the keys must sign."
)
@click.option("--task", default="", help="The one task whose signed releases the device takes.")
@click.option("--kind", default="", help="The device's kind, such as orin.")
@click.option("--mirror", type=click.Path(), help="The mirror's metadata/1.root.json, for pull.")
@as_json
@with_progress
@with_dry_run
def bundle(
    base: str, out: str, engine: str | None, as_json: bool, progress: Any, **given: Any
) -> Callable[[], None]:
    """Make a device folder from BASE, on a build machine: what is deployed once.

    BASE is a .safetensors file, a Hugging Face folder or hf:org/name. The folder serves the base
    until a fine-tune is applied to it.
    """
    from kilodelta.device import bundle

    engines = engine.split(",") if engine is not None else ()
    done = bundle(base, out, engine=engines, progress=progress, **given)
    if as_json:
        return lambda: terminal.print_json(done.to_json())
    return lambda: _show_bundle(out, done)


def _show_bundle(out: str, done: Bundle) -> None:
    size = sum(file.nbytes for file in done.files)
    terminal.print_facts(
        [
            ("device folder", f"{out}, {terminal.size(size)}"),
            ("mode", f"{done.mode}, {done.dtype}, {done.runtime}"),
            ("base", f"{done.base_name or 'unnamed'} {done.base_root}"),
            *(("file", f"{file.file}, {terminal.size(file.nbytes)}") for file in done.files),
        ]
    )


@click.command(
    cls=Command,
    short_help="Give a .kd file its version and a probe of golden outputs.",
    examples=[
        "kilodelta release base/ task.kd -o task-7.kd --version 7 --inputs texts.jsonl",
        "kilodelta release base/ task.kd -o task-7.kd --version 7 --sign team.key --task intents",
    ],
)
@click.argument("base", type=click.Path())
@click.argument("file", type=click.Path())
@click.option("-o", "--out", required=True, type=click.Path(), help="A new .kd file.")
@click.option(
    "--version",
    required=True,
    type=click.IntRange(0, 2**63 - 1),
    help="Devices refuse lower ones than they have had; count from 1 on.",
)
@click.option("--inputs", help="Inputs of the task; the first rows become the probe.")
@outputs
@click.option(
    "--rows", default=2, type=click.IntRange(1), help="Rows of the inputs that become the probe."
)
@click.option("--model", help="package.module:function that builds the module.")
@config
@click.option(
    "--engine",
    multiple=True,
    type=click.Path(),
    help="A device folder whose engine is patched: build the fine-tune's engine for it once, and "
    "state its digest; repeat.",
)
@click.option(
    "--sign", multiple=True, type=click.Path(), help="Private key (NAME.key) to sign with; repeat."
)
@click.option("--task", default="", help="What a signed release is for, such as intents.")
@click.option(
    "--for", "kinds", metavar="KIND[,KIND]", help="The kinds of device it is for; all by default."
)
@click.option("--not-before", default="", help="A date from which it is valid; now by default.")
@click.option("--not-after", default="", help="A date on which it expires; never by default.")
@click.option(
    "--model-signing",
    type=click.Path(),
    help="Private key (NAME.p256.key) for a second signature that model_signing verifies.",
)
@click.option(
    "--pedigree",
    is_flag=True,
    help="Write OUT.cdx.json: a CycloneDX bill of materials that names the base as the ancestor.",
)
@as_json
@with_progress
@with_dry_run
def release(
    base: str,
    file: str,
    out: str,
    kinds: str | None,
    as_json: bool,
    progress: Any,
    **given: Any,
) -> Callable[[], None]:
    """Give a .kd FILE for BASE a version and a probe: golden inputs, and what it must give on them.

    Without --inputs there is no probe: a device then only sees that outputs are finite numbers and
    not the base's.
    """
    from kilodelta.device import release

    split = kinds.split(",") if kinds else ()
    given["password"] = key_password()
    done = release(base, file, out, kinds=split, progress=progress, **given)
    if as_json:
        return lambda: terminal.print_json(done.to_json())
    return lambda: _show_release(done)


def _show_release(done: Released) -> None:
    probe = f"tells in {', '.join(done.dtypes)}" if done.dtypes else "none; give --inputs"
    terminal.print_facts(
        [
            ("file", f"{done.path}, {terminal.size(done.nbytes)}"),
            ("version", done.version),
            ("probe", probe),
            *(("signature", str(path)) for path in done.signatures),
            *([("pedigree", str(done.pedigree))] if done.pedigree else []),
        ]
    )
