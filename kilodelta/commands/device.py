"""The device folder: made on a build machine, changed and used on a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from kilodelta import terminal
from kilodelta.commands.shared import (
    Command,
    as_json,
    flavour,
    max_work,
    outputs,
    with_dry_run,
    with_progress,
)
from kilodelta.commands.trust import key_password

if TYPE_CHECKING:
    from kilodelta.device import Applied, Bundle, Released, Served, State, Status

HISTORY = 10
STDOUT = "-"
"""Journal entries shown."""


@click.command(
    cls=Command,
    short_help="Make a device folder from a base, once, on a build machine.",
    examples=[
        "kilodelta bundle base/ -o device/ --mode adapter --probe texts.jsonl",
        "kilodelta bundle base/ -o device/ --mode adapter --engine sm86,sm89 --dtype fp16",
        "kilodelta bundle base/ -o device/ --mode patch --keep 2",
        "kilodelta bundle base/ -o device/ --mode patch --engine sm86 --dtype fp16",
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
@click.option("--exclude", multiple=True, help="Glob of tensors that they may not; repeat.")
@click.option(
    "--whole",
    multiple=True,
    help="Adapter mode: glob of tensors of BASE that fine-tunes may store whole; repeat.",
)
@click.option(
    "--config",
    help="A fine-tune with a new head: its folder, config.json or .kd file. The base's head.",
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
@click.option("--config", type=click.Path(), help="Folder with the tuned model's config.json.")
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
        ]
    )


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
@click.option(
    "--allow-jump", is_flag=True, help="Take a version further ahead than the bundle allows."
)
@max_work
@as_json
@with_progress
def apply(folder: str, file: str, as_json: bool, progress: Any, **given: Any) -> Callable[[], None]:
    """Serve a .kd FILE from a device FOLDER: prove, build, probe, commit; or change nothing.

    On any error what was served before goes on being served. What goes wrong after the commit is
    a warning, and the command exits 0.
    """
    from kilodelta.device import apply

    done = apply(folder, file, progress=progress, **given)
    if as_json:
        return lambda: terminal.print_json(done.to_json())
    return lambda: _show_apply(done)


def _show_apply(done: Applied) -> None:
    rows: list[tuple[str, object]] = [
        ("serving", _served(done.state.serving)),
        ("before", _served(done.before.serving)),
    ]
    for name, error in done.seen.errors.items():
        most = done.seen.limits[name].relative_l2
        rows.append(("probe", f"{name} within {error.relative_l2:.2g} (at most {most:.2g})"))
    if not done.seen.errors:
        rows.append(("probe", "finite, and not the base's; the file states no golden values"))
    rows.append(("signed by", ", ".join(done.signed_by) or "nobody asked for: unsigned"))
    if done.result_proved:
        rows.append(("result proved", done.result))
    else:
        rows.append(("result", "not proved: weights are not merged here, only the probe tells"))
    terminal.print_facts(rows)
    _warn(done.warnings)


def _warn(warnings: Sequence[str]) -> None:
    for warning in warnings:
        terminal.print_warning(warning)


@click.command(
    cls=Command,
    short_help="Serve again what a device folder served before.",
    examples=["kilodelta rollback device/"],
)
@click.argument("folder", type=click.Path())
@as_json
def rollback(folder: str, as_json: bool) -> None:
    """Serve again what a device FOLDER served before.

    It still lies there, built and probed; its bytes are checked first. No network is needed.
    """
    from kilodelta.device import rollback

    done = rollback(folder)
    if as_json:
        terminal.print_json(done.to_json())
        return
    terminal.print_facts(_standing(done.state))
    _warn(done.warnings)


@click.command(
    cls=Command,
    short_help="Say what a device folder serves and what was done to it.",
    examples=[
        "kilodelta status device/",
        "kilodelta status device/ --check --json",
        "kilodelta status device/ --prometheus /var/lib/node_exporter/textfile/kilodelta.prom",
    ],
)
@click.argument("folder", type=click.Path())
@click.option("--check", is_flag=True, help="Read every byte, and compare the digests.")
@click.option(
    "--prometheus",
    type=click.Path(),
    is_flag=False,
    flag_value="-",
    metavar="[FILE]",
    help="Metrics in Prometheus' text format, into a file for node_exporter, or printed.",
)
@as_json
def status(folder: str, check: bool, prometheus: str | None, as_json: bool) -> None:
    """Say what a device FOLDER is, what it serves, and what was done to it."""
    from kilodelta.device import status

    done = status(folder, check=check, prometheus=None if prometheus == STDOUT else prometheus)
    if prometheus == STDOUT:
        from kilodelta.device.folder.metrics import metrics

        click.echo(metrics(done), nl=False)
        return
    if as_json:
        terminal.print_json(done.to_json())
        return
    _show_status(done)


def _show_status(done: Status) -> None:
    used, free = done.nbytes["base"] + done.nbytes["deltas"], done.nbytes["free"]
    rows: list[tuple[str, object]] = [
        ("mode", f"{done.bundle.mode}, {done.bundle.dtype}, {done.bundle.runtime}"),
        ("base", f"{done.bundle.base_name or 'unnamed'} {done.bundle.base_root}"),
        *_standing(done.state),
        ("releases", _trusted(done)),
        ("disk", f"{terminal.size(used)} used, {terminal.size(free)} free"),
    ]
    if done.checked:
        rows.append(("checked", "every byte is as it was written"))
    if done.unfinished:
        rows.append(("unfinished", "a command is at work, or was killed: the next one recovers"))
    for entry in done.history[-HISTORY:]:
        why = f": {entry['why']}" if "why" in entry else ""
        rows.append((str(entry.get("at", "")), f"{entry['event']}{why}"))
    terminal.print_facts(rows)


def _trusted(done: Status) -> str:
    if done.pins is None:
        return "unsigned ones are taken: this device pins no keys"
    task = f", for task {done.pins.task}" if done.pins.task else ""
    return f"signed by {done.pins.threshold} of {len(done.pins.keys)} pinned keys{task}"


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
        "kilodelta run device/ --inputs two-rows.npz --delta a.kd --delta base",
    ],
)
@click.argument("folder", type=click.Path())
@click.option(
    "--inputs", required=True, type=click.Path(), help="An .npz file with one array per input."
)
@click.option(
    "--delta",
    multiple=True,
    type=click.Path(),
    help="Another .kd file for this request, or: base. Repeat it, once per row of the inputs, "
    "where the folder was bundled with --slots.",
)
@click.option("-o", "--out", type=click.Path(), help="An .npz file for the outputs.")
@as_json
def run(folder: str, inputs: str, delta: tuple[str, ...], out: str | None, as_json: bool) -> None:
    """Compute outputs with what a device FOLDER serves.

    Inputs are arrays, not texts: tokenize in the application.
    """
    from kilodelta.device import run

    described = _summary(run(folder, inputs, delta=delta, out=out))
    if as_json:
        terminal.print_json({"outputs": described, "out": out})
        return
    columns = ("output", "dtype", "shape", "least", "mean", "largest")
    rows = [[_short(value) for value in row.values()] for row in described]
    terminal.print_table(folder, columns, rows)


def _summary(outputs: Any) -> list[dict[str, Any]]:
    """What outputs look like, as JSON can hold it."""
    return [
        {
            "output": name,
            "dtype": str(array.dtype),
            "shape": list(array.shape),
            "least": _number(array.min()) if array.size else None,
            "mean": _number(array.mean(dtype="float64")) if array.size else None,
            "largest": _number(array.max()) if array.size else None,
        }
        for name, array in outputs.items()
    ]


def _number(value: Any) -> float | str:
    """A number, or "nan" and "inf" as texts, which strict JSON lacks."""
    number = float(value)
    return number if abs(number) < float("inf") else str(number)


def _short(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value
