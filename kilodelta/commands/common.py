"""Declare commands, lay out their help, and share options that mean the same in several."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from kilodelta import terminal

F = TypeVar("F", bound=Callable[..., Any])

JSON = "kilodelta.json"
"""The key of `click.Context.meta` under which a command notes that it answers in JSON."""


class Command(click.Command):
    """A command whose help ends with examples, printed as they are typed.

    Declare one with `@click.command(cls=Command, short_help=..., examples=[...])`: `short_help` is
    the line that `kilodelta --help` shows in full, `examples` are whole command lines.
    """

    def __init__(self, *args: Any, examples: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.params.append(_verbose())
        self.examples = tuple(examples)
        for option in self.params:
            if isinstance(option, click.Option) and option.default == "":
                option.show_default = False  # its help says what nothing stands for

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, and refuse what click takes: "$UNSET" as a path would be the working directory,
        and NaN is in no range and out of none.

        Raises:
            click.BadParameter: a path that was given is an empty text, or a number is NaN.
        """
        rest = super().parse_args(ctx, args)
        for parameter in self.params:
            given = ctx.params.get(parameter.name or "")
            paths = given if isinstance(given, tuple) else (given,)
            is_typed = ctx.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
            if isinstance(given, float) and math.isnan(given):
                raise click.BadParameter("NaN is no number", ctx=ctx, param=parameter)
            is_flag = getattr(parameter, "flag_value", None) == ""  # --html without a value
            is_path = isinstance(parameter.type, click.Path) and not is_flag
            if is_path and is_typed and "" in paths:
                raise click.BadParameter("an empty text is no path", ctx=ctx, param=parameter)
        return rest

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, unwrapped: a command line is copied whole or not at all."""
        if self.examples:
            with formatter.section("Examples"):
                formatter.write("".join(f"  {line}\n" for line in self.examples))


LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)


def _verbose() -> click.Option:
    """The option `--verbose` of every command."""
    return click.Option(
        ["-v", "--verbose"],
        count=True,
        expose_value=False,
        show_default=False,
        callback=_log,
        help="Say on stderr what is done; -vv says more.",
    )


def _log(ctx: click.Context, parameter: click.Parameter, value: int) -> None:
    if value:
        ctx.call_on_close(terminal.log_to_stderr(LEVELS[min(value, len(LEVELS) - 1)]))


def _note_json(ctx: click.Context, parameter: click.Parameter, value: bool) -> bool:
    ctx.meta[JSON] = value
    return value


as_json = click.option(
    "--json", "as_json", is_flag=True, callback=_note_json, help="Print one JSON document."
)
quiet = click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
flavour = click.option(
    "--flavour",
    default="auto",
    type=click.Choice(["auto", "tensorrt", "tensorrt_rtx"]),
    help="Which TensorRT; auto takes RTX where it builds for the GPUs asked for.",
)
threads = click.option(
    "--threads", type=click.IntRange(1), help="Cores to use; all by default.", metavar="N"
)
max_work = click.option(
    "--max-work",
    type=click.FloatRange(0, min_open=True),
    metavar="OPERATIONS",
    help="The most that a file may ask for, such as 1e12; by default what suits the base's size.",
)
config = click.option(
    "--config",
    type=click.Path(),
    help="The architecture: the tuned model's folder, its config.json, or a .kd file; by default"
    " what FILE says of it.",
)
outputs = click.option(
    "--outputs",
    multiple=True,
    metavar="NAME",
    help="Names or globs of outputs to take, such as logits or 'aux.*'; repeat. All by default.",
)


def with_dry_run(function: F) -> F:
    """Give a command `--dry-run`, which checks everything, says what would be done, and ends.

    The library function that the command calls must come to `kilodelta.rehearsal.begin_work`.
    """

    @click.option("--dry-run", is_flag=True, help="Check everything, say what would be written.")
    @functools.wraps(function)
    def wrapped(*args: Any, dry_run: bool, **options: Any) -> Any:
        if not dry_run:
            return function(*args, **options)
        from kilodelta.rehearsal import dry_run as rehearse

        with rehearse() as planned:
            function(*args, **options)
        assert planned.is_reached, "a function with --dry-run has no begin_work"
        if not terminal.speaks():
            return None
        if options.get("as_json"):
            return lambda: terminal.print_json({"dry_run": True, **planned.to_json()})
        rows = [
            *(("would write", str(path)) for path in planned.writes),
            *(planned.facts.items()),
            ("dry run", "what can be checked before the work is in order; nothing was written"),
        ]
        return lambda: terminal.print_facts(rows)

    return wrapped  # type: ignore[return-value]


def with_spinner(function: F) -> F:
    """Let a terminal show that a command without stages is at work, as `with_progress` does."""

    @functools.wraps(function)
    def without(*args: Any, progress: Any, **options: Any) -> Any:
        return function(*args, **options)

    return with_progress(without)  # type: ignore[return-value]


def with_progress(function: F) -> F:
    """Hand a command `progress`, which draws unless --quiet or --json is given.

    What the command returns is called once the progress bars are gone, to show the result.
    """

    @quiet
    @functools.wraps(function)
    def wrapped(*args: Any, quiet: bool, **options: Any) -> Any:
        is_quiet = quiet or bool(options.get("as_json")) or not terminal.speaks()
        with terminal.progress(quiet=is_quiet) as progress:
            show = function(*args, progress=progress, **options)
        if show is not None:
            show()

    return wrapped  # type: ignore[return-value]
