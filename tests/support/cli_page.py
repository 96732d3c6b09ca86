"""Write `docs/cli.md` from the command line itself: `python -m tests.support.cli_page`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from kilodelta.cli import main as root

PLACE = Path(__file__).parents[2] / "docs" / "cli.md"
HEAD = """# Commands

Made from the command line's own help by `python -m tests.support.cli_page`; a test compares them.

Every command takes `--help`. Options that hold a size take `12KB`, `1.5MB`, `8KiB` or bytes.
Results go to standard output, progress and errors to standard error; exit codes are in
[troubleshooting](troubleshooting.md). `--dry-run`, where work is long or files are written, checks
everything, says what would be written, and ends. `--verbose` prints what the library logs.

## Completion in the shell

Commands, options, their values and file names complete with the Tab key after one line in the
shell's own file:

| shell | its file | line |
|---|---|---|
| bash | `~/.bashrc` | `eval "$(_KILODELTA_COMPLETE=bash_source kilodelta)"` |
| zsh | `~/.zshrc` | `eval "$(_KILODELTA_COMPLETE=zsh_source kilodelta)"` |
| fish | `config.fish` | `_KILODELTA_COMPLETE=fish_source kilodelta \\| source` |
"""


def page() -> str:
    """Return the page's text."""
    # with the settings of the command line itself, so that defaults are shown as --help shows them
    context = click.Context(root, info_name="kilodelta", **root.context_settings)
    parts = [HEAD]
    for name in root.list_commands(context):
        command = root.get_command(context, name)
        assert command is not None
        parts += _section(command, click.Context(command, info_name=name, parent=context))
    return "\n".join(parts)


def _section(command: click.Command, context: click.Context) -> list[str]:
    out = [f"## {context.command_path}\n", f"{_text(command.help or '')}\n"]
    usage = " ".join(command.collect_usage_pieces(context))
    out.append(f"```text\n{context.command_path} {usage}\n```\n")
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            out += _section(inner, click.Context(inner, info_name=name, parent=context))
        return out
    # --help is every command's, and click remembers its names from whichever context came first.
    options = [p for p in command.params if isinstance(p, click.Option)]
    rows = [row for p in options if (row := p.get_help_record(context))]
    if rows:
        out.append("| option | |\n|---|---|")
        out += [f"| `{_cell(option)}` | {_cell(_text(words))} |" for option, words in rows]
        out.append("")
    return out


def _text(words: str) -> str:
    """Text of a help page as Markdown: examples (click's \\b blocks) stay as they are laid out."""
    blocks = []
    for block in words.split("\n\n"):
        if block.startswith("\b"):
            blocks.append("```text\n" + block.removeprefix("\b\n") + "\n```")
        else:
            blocks.append(" ".join(block.split()))
    return "\n\n".join(blocks).replace("\f", "").strip()


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


if __name__ == "__main__":
    PLACE.write_text(page())
    sys.stdout.write(f"{PLACE}\n")
