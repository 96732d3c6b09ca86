"""The device folder: made on a build machine, changed and used on a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from kilodelta import terminal
from kilodelta.commands.shared import Command, as_json, flavour, with_progress
from kilodelta.errors import require

if TYPE_CHECKING:
    from kilodelta.device.folder.state import Served, State
    from kilodelta.device.folder.status import Status

HISTORY = 10
"""Journal entries shown."""


@click.command(
    cls=Command,
    short_help="Make a device folder from a base, once, on a build machine.",
    examples=[
        "kilodelta bundle base/ -o device/ --mode adapter --probe texts.jsonl",
        "kilodelta bundle base/ -o device/ --mode adapter --engine sm86,sm89 --dtype fp16",
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
@click.option("--onnx", is_flag=True, help="Keep the ONNX file; the default without --engine.")
@click.option("--engine", metavar="SM[,SM]", help="Run in TensorRT on GPUs such as sm89.")
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
@click.option("--targets", multiple=True, help="Globs of tensors that fine-tunes change; repeat.")
@click.option("--exclude", multiple=True, help="Globs of tensors that they do not; repeat.")
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    metavar="AXIS=MIN,OPT,MAX",
    help="An engine's sizes of an axis, such as batch=1,8,32; repeat.",
)
@click.option("--model", help="package.module:function that builds the module.")
@click.option("--name", default="", help="The base's name, for messages.")
@click.option("--probe", help="Golden inputs: .npz, .jsonl, .txt or module:function.")
@click.option(
    "--keep",
    default=1,
    type=click.IntRange(1),
    help="Fine-tunes to keep on the disk to go back to.",
)
@as_json
@with_progress
def bundle(
    base: str,
    out: str,
    engine: str | None,
    dtype: str,
    targets: tuple[str, ...],
    profiles: tuple[str, ...],
    as_json: bool,
    progress: Any,
    **given: Any,
) -> Callable[[], None]:
    """Make a device folder from BASE, on a build machine: what is deployed once."""
    require("torch", extra="onnx", why="export models")
    from kilodelta.device.make.build import Options, make
    from kilodelta.export.pipeline import SHORT
    from kilodelta.export.tensorrt.profile import read_sizes

    options = Options(
        dtype=SHORT[dtype],
        capabilities=tuple(engine.split(",")) if engine is not None else (),
        include=targets,
        sizes=read_sizes(profiles),
        **given,
    )
    done = make(base, out, options, progress=progress)

    def show() -> None:
        if as_json:
            terminal.print_json(done.to_json())
            return
        size = sum(file.nbytes for file in done.files)
        terminal.print_facts(
            [
                ("device folder", f"{out}, {terminal.size(size)}"),
                ("mode", f"{done.mode}, {done.dtype}, {done.runtime}"),
                ("base", f"{done.name or 'unnamed'} {done.root}"),
                *(("file", f"{file.file}, {terminal.size(file.nbytes)}") for file in done.files),
            ]
        )

    return show


@click.command(
    cls=Command,
    short_help="Give a .kd file its version and a probe of golden outputs.",
    examples=["kilodelta release base/ task.kd -o task-7.kd --version 7 --inputs texts.jsonl"],
)
@click.argument("base", type=click.Path())
@click.argument("file", type=click.Path())
@click.option("-o", "--out", required=True, type=click.Path(), help="A new .kd file.")
@click.option(
    "--version", "number", required=True, type=click.IntRange(0), help="Devices refuse lower ones."
)
@click.option("--inputs", help="Inputs of the task; the first rows become the probe.")
@click.option(
    "--rows", default=2, type=click.IntRange(1), help="Rows of the inputs that become the probe."
)
@click.option("--model", help="package.module:function that builds the module.")
@click.option("--config", type=click.Path(), help="Folder with the tuned model's config.json.")
@as_json
@with_progress
def release(
    base: str, file: str, out: str, number: int, as_json: bool, progress: Any, **given: Any
) -> Callable[[], None]:
    """Give a .kd FILE a version and a probe: golden inputs, and what it must give on them."""
    from kilodelta.device.make.release import release

    if given["inputs"] is not None:
        require("torch", extra="hf", why="compute golden outputs")
    done = release(base, file, out, version=number, progress=progress, **given)

    def show() -> None:
        if as_json:
            terminal.print_json(done.to_json())
            return
        probe = f"tells in {', '.join(done.dtypes)}" if done.dtypes else "none; give --inputs"
        terminal.print_facts(
            [
                ("file", f"{done.path}, {terminal.size(done.nbytes)}"),
                ("version", done.version),
                ("probe", probe),
            ]
        )

    return show


@click.command(
    cls=Command,
    short_help="Serve a .kd file from a device folder, or change nothing.",
    examples=[
        "kilodelta apply device/ task-7.kd",
        "kilodelta apply device/ task-6.kd --allow-downgrade --json",
    ],
)
@click.argument("folder", type=click.Path())
@click.argument("file", type=click.Path())
@click.option("--allow-downgrade", is_flag=True, help="Take a file of a lower version.")
@as_json
@with_progress
def apply(
    folder: str, file: str, allow_downgrade: bool, as_json: bool, progress: Any
) -> Callable[[], None]:
    """Serve a .kd FILE from a device FOLDER: prove, build, probe, commit; or change nothing."""
    from kilodelta.device.update.apply import apply

    done = apply(folder, file, allow_downgrade=allow_downgrade, progress=progress)

    def show() -> None:
        if as_json:
            terminal.print_json(done.to_json())
            return
        rows: list[tuple[str, object]] = [
            ("serving", _served(done.state.serving)),
            ("before", _served(done.before.serving)),
        ]
        for name, error in done.seen.errors.items():
            most = done.seen.limits[name].relative_l2
            rows.append(("probe", f"{name} within {error.relative_l2:.2g} (at most {most:.2g})"))
        if not done.seen.errors:
            rows.append(("probe", "finite, and not the base's; the file states no golden values"))
        terminal.print_facts(rows)

    return show


@click.command(
    cls=Command,
    short_help="Serve again what a device folder served before.",
    examples=["kilodelta rollback device/"],
)
@click.argument("folder", type=click.Path())
@as_json
def rollback(folder: str, as_json: bool) -> None:
    """Serve again what a device FOLDER served before."""
    from kilodelta.device.update.rollback import rollback

    after = rollback(folder)
    if as_json:
        terminal.print_json(after.to_json())
        return
    terminal.print_facts(_standing(after))


@click.command(
    cls=Command,
    short_help="Say what a device folder serves and what was done to it.",
    examples=["kilodelta status device/", "kilodelta status device/ --check --json"],
)
@click.argument("folder", type=click.Path())
@click.option("--check", is_flag=True, help="Read every byte, and compare the digests.")
@as_json
def status(folder: str, check: bool, as_json: bool) -> None:
    """Say what a device FOLDER is, what it serves, and what was done to it."""
    from kilodelta.device.folder.status import status

    found = status(folder, check=check)
    if as_json:
        terminal.print_json(found.to_json())
        return
    _show_status(found)


def _show_status(found: Status) -> None:
    used, free = found.nbytes["base"] + found.nbytes["deltas"], found.nbytes["free"]
    rows: list[tuple[str, object]] = [
        ("mode", f"{found.bundle.mode}, {found.bundle.dtype}, {found.bundle.runtime}"),
        ("base", f"{found.bundle.name or 'unnamed'} {found.bundle.root}"),
        *_standing(found.state),
        ("disk", f"{terminal.size(used)} used, {terminal.size(free)} free"),
    ]
    if found.checked:
        rows.append(("checked", "every byte is as it was written"))
    if found.unfinished:
        rows.append(("unfinished", "a command is at work, or was killed: the next one recovers"))
    for entry in found.history[-HISTORY:]:
        why = f": {entry['why']}" if "why" in entry else ""
        rows.append((str(entry.get("at", "")), f"{entry['event']}{why}".splitlines()[0]))
    terminal.print_facts(rows)


def _standing(state: State) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [("serving", _served(state.serving))]
    rows += [("rollback to", _served(item)) for item in state.before]
    return [*rows, ("highest", f"version {state.highest}")]


def _served(item: Served) -> str:
    return f"version {item.version}, {item.delta}" if item.delta else "the base"


@click.command(
    cls=Command,
    short_help="Compute outputs with what a device folder serves.",
    examples=[
        "kilodelta run device/ --inputs inputs.npz -o outputs.npz",
        "kilodelta run device/ --inputs inputs.npz --delta other.kd",
    ],
)
@click.argument("folder", type=click.Path())
@click.option("--inputs", required=True, type=click.Path(), help="An .npz file, an array an input.")
@click.option(
    "--delta",
    "deltas",
    multiple=True,
    type=click.Path(),
    help="Another .kd file for this request, or: base. Repeat it once a row where the folder was "
    "bundled with --slots.",
)
@click.option("-o", "--out", type=click.Path(), help="An .npz file for the outputs.")
@as_json
def run(folder: str, inputs: str, deltas: tuple[str, ...], out: str | None, as_json: bool) -> None:
    """Compute outputs with what a device FOLDER serves."""
    from kilodelta.device import Device
    from kilodelta.device.golden.arrays import read_npz, summary, write_npz

    chosen = {"delta": deltas[0] if deltas else None} if len(deltas) < 2 else {"deltas": deltas}
    found = Device(folder).run(read_npz(inputs), **chosen)
    if out is not None:
        write_npz(out, found)
    described = summary(found)
    if as_json:
        terminal.print_json({"outputs": described, "out": out})
        return
    columns = ("output", "dtype", "shape", "least", "mean", "largest")
    rows = [[_short(value) for value in row.values()] for row in described]
    terminal.print_table(folder, columns, rows)


def _short(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value
