"""Show what a file, a model or this machine is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from kilodelta import terminal
from kilodelta.commands.common import Command, as_json, threads, with_progress, with_spinner

if TYPE_CHECKING:
    from kilodelta.grid import LogicalIdentity

_COMPATIBILITY = "a compatibility form: floats, its result by the ordered sum of this package alone"


@click.command(
    cls=Command,
    short_help="Say what a .kd file is, needs and holds.",
    examples=["kilodelta inspect task.kd", "kilodelta inspect task.kd --json"],
)
@click.argument("file", type=click.Path())
@as_json
@with_spinner
def inspect(file: str, as_json: bool) -> Callable[[], None]:
    """Say what a .kd FILE is, what it needs, and where its bytes go."""
    from kilodelta.format.inspect import inspect
    from kilodelta.format.method_options import options_in_words
    from kilodelta.models import locate_delta

    found = inspect(locate_delta(file))
    if as_json:
        return lambda: terminal.print_json(found.to_json())
    options = options_in_words(found.method)
    return lambda: terminal.print_facts(
        [
            ("file", f"{found.path}, {terminal.size(found.nbytes['file'])}"),
            ("base", f"{found.base['name'] or 'unnamed'}, {found.base['tensors']} tensors"),
            ("", found.base["root"]),
            *(("grid", line) for line in _grid_lines(found.grid)),
            ("method", f"{found.method['name']}: {options} ({found.paper})"),
            ("seed", found.seed),
            ("targets", f"{found.targets['count']}: {' '.join(found.targets['include'])}"),
            *(
                (k, " ".join(v))
                for k, v in found.targets.items()
                if k != "include" and isinstance(v, tuple) and v
            ),
            ("coefficients", f"{found.coefficients} of {found.bits} bits"),
            *(() if found.exact else [("exactness", _COMPATIBILITY)]),
            *(("extra", f"{name} {kind}") for name, kind in found.extras.items()),
            *(("probe", f"{name} {kind}") for name, kind in found.probes.items()),
            ("result", found.result),
            *([("beside", found.beside)] if found.beside else ()),
            *(("made for", line) for line in _fidelity_lines(found.fidelity)),
            *(("made", f"{name} {value}") for name, value in found.made.items()),
            *(("config", f"{key} {_short(value)}") for key, value in found.config.items()),
            *(("bytes", f"{count:>9}  {part}") for part, count in found.nbytes.items()),
        ]
    )


def _grid_lines(grid: Mapping[str, Any] | None) -> list[str]:
    """Say what a quantised base is."""
    if grid is None:
        return []
    return [f"{grid['weights']} weights, {', '.join(grid['kinds'])}", f"logical {grid['logical']}"]


def _fidelity_lines(fidelity: Mapping[str, Mapping[str, object]]) -> list[str]:
    """Say what the file keeps in each precision that it was made for."""
    lines = []
    for name, measures in fidelity.items():
        parts = [f"agreement {measures['agreement']}"] if "agreement" in measures else []
        share = measures.get("codes_changed")
        if isinstance(share, (int, float)):
            parts.append(f"{share:.1%} of the codes change")
        lines.append(f"{name}: {', '.join(parts)}")
    return lines


def _short(value: object, width: int = 100) -> str:
    """Write a value of a configuration as JSON, cut to one line."""
    found = json.dumps(value, ensure_ascii=True)
    return found if len(found) <= width else f"{found[: width - 3]}..."


@click.command(
    cls=Command,
    short_help="Print a model's root, by which .kd files name their base.",
    examples=["kilodelta digest base/", "kilodelta digest base/model.safetensors --tensors"],
)
@click.argument("model", type=click.Path())
@click.option("--tensors", is_flag=True, help="Print the digest of each tensor as well.")
@click.option(
    "--cached",
    is_flag=True,
    help="Take digests remembered of files whose size and times are unchanged: fast, no proof.",
)
@threads
@as_json
@with_progress
def digest(
    model: str, tensors: bool, cached: bool, threads: int | None, as_json: bool, progress: Any
) -> Callable[[], None]:
    """Print the root of a MODEL: a .safetensors file, a Hugging Face folder or cache folder.

    Of a quantised one (a folder, a .gguf or an .onnx file) the logical root as well: over codes,
    scales and zero points, whatever their layout.
    """
    from kilodelta.files.model_digest import digest
    from kilodelta.grid.open import is_quantised, open_quantised
    from kilodelta.models import locate

    logical, model = None, str(locate(model))
    if is_quantised(model):
        opened = open_quantised(model)
        found = opened.stored_identity(threads=threads, progress=progress)
        logical = opened.identity(threads=threads, progress=progress)
        method = opened.method
    else:
        found = digest(model, cached=cached, threads=threads, progress=progress)

    def show() -> None:
        if as_json:
            listed = {"tensors": dict(found.tensors)} if tensors else {}
            table = {"root": found.root, "count": len(found.tensors), **listed}
            if logical is not None:
                table["quantised"] = {"method": method, **_logical_json(logical, tensors)}
            terminal.print_json(table)
            return
        for name, text in found.tensors.items() if tensors else ():
            print(f"{text}  {name}")
        print(f"{found.root}  {model}" if not tensors else f"{found.root}  (root)")
        if logical is not None:
            for name, text in logical.weights.items() if tensors else ():
                print(f"{text}  {name} (logical)")
            print(f"{logical.root}  (logical root of {len(logical.weights)} weights, {method})")
            print(f"{logical.plain}  (all other tensors, by value)")
            print(f"{logical.config}  (quantisation configuration)")
            if logical.still_blocks:
                terminal.print_warning(
                    f"{logical.still_blocks} blocks have a step of zero: no merge in the grid"
                    " changes their weights"
                )

    return show


def _logical_json(logical: LogicalIdentity, tensors: bool) -> dict[str, Any]:
    listed = {"weights": dict(logical.weights)} if tensors else {}
    return {
        "logical_root": logical.root,
        "count": len(logical.weights),
        "plain_root": logical.plain,
        "configuration": logical.config,
        "still_blocks": logical.still_blocks,
        **listed,
    }


@click.command(
    cls=Command,
    short_help="Say what this machine can run, and how to install the rest.",
    examples=["kilodelta doctor"],
)
@as_json
@with_spinner
def doctor(as_json: bool) -> Callable[[], None]:
    """Say what this machine can do, and the command that installs what is missing."""
    from kilodelta.verify import doctor as examine

    found = examine()

    def show() -> None:
        if as_json:
            terminal.print_json(found.to_json())
            return
        for table in found.tables():
            terminal.print_table(table.title, table.columns, table.rows, right=table.right)

    return show
