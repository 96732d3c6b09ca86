"""`kilodelta export --adapter`: its options, and what is shown of the folder."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kilodelta import terminal
from kilodelta.commands.export_peft import refuse_others
from kilodelta.errors import InputError

if TYPE_CHECKING:
    from kilodelta.export.adapter.folder import AdapterFolder

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--adapter",
        is_flag=True,
        help="The base's graph and an .onnx_adapter file instead; into the same OUT for the next.",
    ),
    click.option(
        "--rank", type=click.IntRange(1), help="Of its graph: the highest rank; 8 by default."
    ),
    click.option(
        "--targets", multiple=True, help="Of its graph: globs of weights to expose; all layers."
    ),
)


def adapter_options(function: F) -> F:
    """Add `--adapter` and its companions to the export command, which never sees them."""

    @functools.wraps(function)
    def wrapped(
        *args: Any, adapter: bool, rank: int | None, targets: tuple[str, ...], **given: Any
    ) -> Any:
        if adapter:
            return _run(given, rank, targets)
        if rank or targets:
            name = "rank" if rank else "targets"
            raise InputError(f"--{name} is an option of adapter files", fix="add --adapter")
        return function(*args, **given)

    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[return-value]


def _run(given: dict[str, Any], rank: int | None, targets: tuple[str, ...]) -> Callable[[], None]:
    from kilodelta.export.adapter.folder import AdapterOptions, export_adapter
    from kilodelta.export.options import SHORT

    refuse_others(given, "adapter", ("peft", "config", "force"))
    options = AdapterOptions(
        dtype=SHORT[given["dtypes"][0]],
        rank=rank or AdapterOptions.rank,
        include=targets,
        model=given["model"],
        inputs=given["inputs"],
    )
    done = export_adapter(
        given["base"], given["file"], given["out"], options, progress=given["progress"]
    )
    if given["as_json"]:
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
