"""The command line: arguments in, one function of the library called, its result shown."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from kilodelta import __version__, terminal
from kilodelta.commands import (
    compress,
    demo,
    device,
    export_adapter,
    export_peft,
    import_,
    inspect_,
    merge_export,
    verify,
)
from kilodelta.errors import KiloDeltaError


class _Commands(click.Group):
    """Turns the library's errors into a sentence with a fix and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KiloDeltaError as error:
            if "--json" in sys.argv:
                terminal.print_json({"error": error.what, "fix": error.fix})
            terminal.print_error(error.what, error.fix)
            raise SystemExit(error.exit_code) from None
        except KeyboardInterrupt:
            terminal.print_error("interrupted", "nothing half-done was left behind; start again")
            raise SystemExit(130) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kilodelta")
def main() -> None:
    """A fine-tuned model as base digest + seed + integer coefficients: kilobytes, merged back
    bit-identically on every machine."""


for _command in (
    inspect_.inspect,
    inspect_.digest,
    inspect_.doctor,
    compress.compress,
    import_.bring,
    merge_export.merge,
    merge_export.export,
    export_peft.export_peft,
    export_adapter.export_adapter,
    verify.verify,
    demo.demo,
    device.bundle,
    device.release,
    device.apply,
    device.rollback,
    device.status,
    device.run,
):
    main.add_command(_command)
