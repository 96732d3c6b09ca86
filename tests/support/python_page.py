"""Write docs/python.md: every command and the Python function of the same name, side by side.

`python -m tests.support.python_page > docs/python.md` after an option or a parameter has changed.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import click

from kilodelta.cli import SECTIONS

FUNCTIONS = {
    "demo": "kilodelta.demo.demo",
    "compress": "kilodelta.compress.compress",
    "plan": "kilodelta.compress.plan",
    "import": "kilodelta.compress.import_adapter",
    "rebase": "kilodelta.merging.rebase.rebase",
    "merge": "kilodelta.merge",
    "export": "kilodelta.export.export",
    "export-peft": "kilodelta.export.export_peft",
    "export-adapter": "kilodelta.export.export_adapter",
    "export-gguf": "kilodelta.export.gguf.export_gguf",
    "export-edge-llm": "kilodelta.export.edge_llm.export_edge_llm",
    "card": "kilodelta.report.card.card",
    "inspect": "kilodelta.inspect",
    "digest": "kilodelta.digest",
    "diff": "kilodelta.merging.diff.diff",
    "verify": "kilodelta.verify.verify",
    "doctor": "kilodelta.verify.doctor",
    "bundle": "kilodelta.device.bundle",
    "release": "kilodelta.device.release",
    "apply": "kilodelta.device.apply",
    "rollback": "kilodelta.device.rollback",
    "status": "kilodelta.device.status",
    "run": "kilodelta.device.run",
    "trust": "kilodelta.device.trust",
    "pull": "kilodelta.device.pull",
    "keygen": "kilodelta.trust.keygen",
    "publish": "kilodelta.trust.publish",
}
"""Command to function. Groups of commands are not functions."""

GROUPS = {"fleet"}

TERMINAL = {"json", "quiet", "verbose", "help", "dry-run"}
"""Options that say how a result is shown; functions return it. `kilodelta.dry_run` is a block."""

OTHER_NAMES: Mapping[tuple[str, str], str] = {
    ("pull", "apply"): "`kilodelta.device.apply` of the result",
    ("digest", "tensors"): "the result's `tensors`",
    ("diff", "all"): "the result's `rows`",
    ("release", "for"): "`kinds`",
    ("compress", "rank"): "`options.method`",
    ("compress", "bases"): "`options.method`",
    ("compress", "for"): "`options.precisions`",
    ("compress", "lr"): "`options.rate`",
    ("plan", "lr"): "`options.rate`",
    ("export-adapter", "targets"): "`options.include`",
    ("card", "out"): "write the text that is returned",
    ("card", "force"): "write the text that is returned",
}
"""What is spelt differently in Python, and how."""

HEAD = """\
# From Python

Each command of `kilodelta` is one function with the command's options. Functions print nothing,
take `progress=` (a callback that is told about every stage), return what the command shows, and
raise a `kilodelta.errors.KiloDeltaError` with `what`, `fix` and `exit_code` where the command ends
in an error.

```python
import kilodelta

kilodelta.digest("base/").root  # sha256:...
delta = kilodelta.load("task.kd", base="base/")
delta.expand("encoder.layer.0.output.dense.weight")  # the exact integer update, int64 (out, in)
kilodelta.merge("base/", "task.kd", "merged/")
kilodelta.device.apply("device/", "task-7.kd").state.serving.version
```

All that has to be imported is `kilodelta`: its packages `compress`, `train`
([train.md](train.md)), `export`, `verify`, `device` and `trust` load when they are first used, and
what a device needs works without torch.

Options that may be repeated take a sequence: `--exclude a --exclude b` is `exclude=["a", "b"]`. So
do those that list by comma: `--engine sm86,sm89` is `engine=["sm86", "sm89"]`. `--json`,
`--quiet` and `--verbose` are the terminal's; results have `to_json()`, and everything logs to the
logger `kilodelta`, which has no handler unless the program gives it one. `--dry-run` is a block:

```python
with kilodelta.dry_run() as rehearsed:
    kilodelta.merge("base/", "task.kd", "elsewhere/")
rehearsed.writes, rehearsed.facts  # nothing was written
```

This page is written by `python -m tests.support.python_page`, and a test compares the two.
"""


def function_of(command: str) -> Callable[..., Any]:
    """The Python function of a command."""
    module, _, name = FUNCTIONS[command].rpartition(".")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def parameters(function: Callable[..., Any]) -> dict[str, str]:
    """How each thing that a function takes is written: its own parameters, and the fields of a
    parameter `options`."""
    hints = typing.get_type_hints(function)
    found = {}
    for name in inspect.signature(function).parameters:
        found[name] = name
        kinds = [kind for kind in (hints[name], *typing.get_args(hints[name]))]
        for kind in kinds if name == "options" else ():
            if dataclasses.is_dataclass(kind):
                found |= {field.name: f"options.{field.name}" for field in dataclasses.fields(kind)}
    return found


def spelt(command: str, option: click.Option, known: Mapping[str, str]) -> str | None:
    """How an option is written in Python; None where it is not there."""
    name = long_name(option).replace("-", "_")
    if (command, name) in OTHER_NAMES:
        return OTHER_NAMES[command, name]
    way = known.get(name) or known.get(f"{name}s")
    return None if way is None else f"`{way}`"


def long_name(option: click.Option) -> str:
    return next(text for text in option.opts if text.startswith("--")).removeprefix("--")


def options(command: click.Command) -> Iterator[click.Option]:
    """A command's options, without the terminal's own."""
    for parameter in command.params:
        if isinstance(parameter, click.Option) and long_name(parameter) not in TERMINAL:
            yield parameter


def page() -> str:
    """The text of docs/python.md."""
    parts = [HEAD]
    for title, commands in SECTIONS.items():
        shown = [command for command in commands if command.name in FUNCTIONS]
        if shown:
            parts += [f"## {title}\n", *map(_command, shown)]
    return "\n".join(parts)


def _command(command: click.Command) -> str:
    name = str(command.name)
    function = function_of(name)
    known = parameters(function)
    places = " ".join(
        p.make_metavar(click.Context(command))
        for p in command.params
        if isinstance(p, click.Argument)
    )
    lines = [
        f"### `kilodelta {' '.join(filter(None, (name, places)))}`",
        "",
        f"`{FUNCTIONS[name]}({', '.join(_positional(function))})`: {_first_line(function)}",
        "",
    ]
    rows = [
        f"| {', '.join(f'`{text}`' for text in option.opts)} | {spelt(name, option, known)} |"
        for option in options(command)
    ]
    if rows:
        lines += ["| option | in Python |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def _positional(function: Callable[..., Any]) -> list[str]:
    """The parameters before the first optional one."""
    given = inspect.signature(function).parameters.values()
    names = [p.name for p in given if p.default is p.empty and p.kind is not p.KEYWORD_ONLY]
    return [*names, "..."] if len(names) < len(given) else names


def _first_line(function: Callable[..., Any]) -> str:
    text = inspect.getdoc(function) or ""
    return re.sub(r"\s+", " ", text.partition("\n\n")[0])


if __name__ == "__main__":
    print(page(), end="")
