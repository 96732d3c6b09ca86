"""The command line: arguments in, one function of the library called, its result shown.

Each command has a Python function with the same options (docs/python.md), does no work itself, and
imports that function when it runs, so that `kilodelta --help` answers at once.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

import click

from kilodelta import __version__, memory, terminal
from kilodelta.commands import (
    compare,
    compress,
    demo,
    device,
    export,
    fleet,
    import_,
    inspect_,
    plan,
    rebase,
    trust,
    verify,
)
from kilodelta.commands.common import JSON
from kilodelta.errors import InputError, KiloDeltaError, one_line

_SMALLER = (
    "end other programs or use a machine with more memory; of what the command offers, give a"
    " smaller --batch, --max-length or --limit, or --dtype bf16"
)
SECTIONS = {
    "Start": (demo.demo,),
    "Make a .kd file": (compress.compress, plan.plan, import_.import_adapter, rebase.rebase),
    "Use it": (
        export.merge,
        export.export,
        export.export_peft,
        export.export_adapter,
        export.export_gguf,
        export.export_edge_llm,
        compare.card,
    ),
    "Look and prove": (
        inspect_.inspect,
        inspect_.digest,
        compare.diff,
        verify.verify,
        inspect_.doctor,
    ),
    "Deploy to devices": (
        device.bundle,
        device.release,
        device.apply,
        device.rollback,
        device.status,
        device.run,
    ),
    "Sign, publish, and do many at once": (
        trust.keygen,
        trust.trust,
        trust.publish,
        trust.pull,
        fleet.fleet,
    ),
}
"""The commands in the order of a fine-tune's life, as `kilodelta --help` lists them."""


class _Commands(click.Group):
    """Lists commands by section, and turns errors into a sentence with a fix and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each section with its commands, their summaries wrapped and never cut."""
        width = max(map(len, self.commands))
        for title, commands in SECTIONS.items():
            rows = [(f"{c.name:<{width}}", c.get_short_help_str()) for c in commands]
            with formatter.section(title):
                formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        arguments = list(ctx.args)  # click takes them out of the context
        try:
            with _signals_as_interrupts():
                return super().invoke(ctx)
        except KiloDeltaError as error:
            _refuse(ctx, error)
        except click.UsageError as error:
            if _asks_for_json(arguments) and terminal.speaks():
                where = error.ctx.command_path if error.ctx else "kilodelta"
                terminal.print_json({"error": error.format_message(), "fix": f"see {where} --help"})
            raise  # click prints it to stderr, with the command's usage, and exits with 2
        except KeyboardInterrupt as stop:
            number = getattr(stop, "signal", signal.SIGINT)
            if terminal.speaks():
                what, fix = _ended_by(number, self.commands.get(ctx.invoked_subcommand or ""))
                if ctx.meta.get(JSON):
                    terminal.print_json({"error": what, "fix": fix})
                terminal.print_error(what, fix)
            raise SystemExit(128 + number) from None
        except (MemoryError, RuntimeError) as error:
            if not memory.has_run_out(error):
                raise
            _refuse(ctx, InputError(f"memory ran out: {one_line(error)}"[:200], fix=_SMALLER))
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            # Any look at such a path fails, so that no command need ask for it in each place.
            what = f"{error.filename!s:.80}... is too long for a path"
            _refuse(ctx, InputError(what, fix="check the path"))


def _asks_for_json(arguments: list[str]) -> bool:
    """Tell whether `--json` is among arguments that click could not read, before any `--`."""
    return "--json" in arguments[: (*arguments, "--").index("--")]


def _refuse(ctx: click.Context, error: KiloDeltaError) -> NoReturn:
    """Show an error as a sentence with a fix, as JSON too where that was asked for, and exit."""
    if not terminal.speaks() and not error.is_local:  # the first of several processes says it
        raise SystemExit(error.exit_code) from None
    if ctx.meta.get(JSON) and terminal.speaks():
        terminal.print_json({"error": error.what, "fix": error.fix})
    terminal.print_error(error.what, error.fix)
    raise SystemExit(error.exit_code) from None


def _ended_by(number: int, command: click.Command | None) -> tuple[str, str]:
    """Say what a signal did to a command, and what to do next."""
    if terminal.has_others() and number == signal.SIGTERM:
        return (
            "stopped from outside, as torchrun does with all processes when one has ended",
            "look at what that one said; give --resume where a .resume file lies beside the output,"
            " else start again: nothing half-done was left behind",
        )
    again = "nothing half-done was left behind; start again"
    if command is not None and any(option.name == "resume" for option in command.params):
        again += ", with --resume if it had begun to train"
    return "interrupted", again


class _Stopped(KeyboardInterrupt):
    """The process was asked to end by a signal other than Ctrl-C's."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = number


@contextlib.contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does, so that it removes what it had begun.

    By default they end a process at once: `docker stop`, systemd and batch systems send SIGTERM,
    a terminal that is closed SIGHUP.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # once: a second one would interrupt the clearing up
        raise _Stopped(number)

    before = {}
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        # `nohup` ignores SIGHUP on purpose; outside the main thread `signal.signal` raises.
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            with contextlib.suppress(ValueError):
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(__version__, prog_name="kilodelta")
def main() -> None:
    """A fine-tuned model as base digest + seed + integer coefficients: kilobytes, merged back
    bit-identically on every machine.

    `kilodelta COMMAND --help` shows a command's options and examples.
    """


# A process that ends need not look for garbage: among numba's objects it took a tenth of a second.
atexit.register(gc.freeze)

for _commands in SECTIONS.values():
    for _command in _commands:
        main.add_command(_command)
