"""What commands share: options, and progress that is drawn or silent."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import click

from kilodelta import terminal

F = TypeVar("F", bound=Callable[..., Any])

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
quiet = click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
flavour = click.option(
    "--flavour",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "tensorrt", "tensorrt_rtx"]),
    help="Which TensorRT; auto takes RTX where it builds for the GPUs asked for.",
)
threads = click.option(
    "--threads", type=click.IntRange(1), help="Cores to use; all by default.", metavar="N"
)


def with_progress(function: F) -> F:
    """Hand a command `progress`, drawn unless --quiet or --json is given."""

    @quiet
    @functools.wraps(function)
    def wrapped(*args: Any, quiet: bool, **options: Any) -> Any:
        with terminal.progress(quiet=quiet or bool(options.get("as_json"))) as progress:
            show = function(*args, progress=progress, **options)
        if show is not None:
            show()

    return wrapped  # type: ignore[return-value]
