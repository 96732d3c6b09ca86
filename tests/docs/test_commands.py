"""Commands in README and docs: each parses as it is written, those on the clone's files run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from kilodelta.cli import main
from tests.support.processes import ROOT

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
MADE = {"cli.md"}
"""Pages that are made from the command line, which their own test compares."""
USAGE = re.compile(r"[\[\]|]|\.\.\.")
"""What makes a line a description of a command rather than a command."""
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def commands(page: Path) -> Iterator[str]:
    """Yield the command lines of kilodelta in a page's blocks, without comments and prompts."""
    for language, text in BLOCK.findall(page.read_text()):
        if language not in ("", "sh", "bash", "text"):
            continue
        for line in text.replace("\\\n", " ").splitlines():
            bare = re.sub(r"\s+#.*", "", line.strip().removeprefix("$ "))
            for part in bare.split("&&"):
                if part.strip().startswith("kilodelta ") and not USAGE.search(part):
                    yield part.strip()


LINES = [(page.name, line) for page in PAGES if page.name not in MADE for line in commands(page)]


def test_there_are_commands_on_the_pages_that_teach_them() -> None:
    taught = {page for page, _ in LINES}
    assert {"README.md", "deploy.md", "fleet.md", "security.md", "import.md"} <= taught
    assert len(LINES) > 40


@pytest.mark.parametrize(("page", "line"), LINES)
def test_a_command_parses_as_it_is_written(page: str, line: str) -> None:
    """Names of commands and options, their values, and the number of arguments."""
    words = shlex.split(line)[1:]
    group: click.Command = main
    context = click.Context(main, info_name="kilodelta")
    while isinstance(group, click.Group):
        assert words, f"{page}: {line} names no command"
        found = group.get_command(context, words[0])
        assert found is not None, f"{page}: there is no command {words[0]}"
        group, words = found, words[1:]
    if not words and not group.params:
        return
    group.make_context(group.name, words, parent=context)


def runnable() -> list[str]:
    """The README's commands on files that lie in the clone."""
    return [line for page, line in LINES if page == "README.md" and "tests/golden" in line]


def test_the_readmes_commands_on_the_clones_files_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = runnable()
    assert len(lines) >= 4
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    for line in lines:
        result = CliRunner().invoke(main, shlex.split(line)[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}"
    assert (tmp_path / "merged.safetensors").exists()


def test_a_wrong_command_is_found() -> None:
    """The test above can fail."""
    with pytest.raises(click.UsageError):
        test_a_command_parses_as_it_is_written("x.md", "kilodelta merge base task.kd --nothing")
    with pytest.raises(AssertionError):
        test_a_command_parses_as_it_is_written("x.md", "kilodelta mrege base task.kd -o x")
