"""Commands in README and docs: each parses as it is written; test_pages.py runs them."""

from __future__ import annotations

import shlex

import click
import pytest

from kilodelta.cli import main
from tests.support.pages import MADE, PAGES, commands

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


def test_a_wrong_command_is_found() -> None:
    """The test above can fail."""
    with pytest.raises(click.UsageError):
        test_a_command_parses_as_it_is_written("x.md", "kilodelta merge base task.kd --nothing")
    with pytest.raises(AssertionError):
        test_a_command_parses_as_it_is_written("x.md", "kilodelta mrege base task.kd -o x")
