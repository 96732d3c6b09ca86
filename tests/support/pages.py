"""The fenced blocks of README and docs, and the command lines in them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from tests.support.processes import ROOT

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
MADE = {"cli.md"}
"""Pages that are made from the command line, which their own test compares."""
USAGE = re.compile(r"[\[\]|]|\.\.\.")
"""What makes a line a description of a command rather than a command."""
BLOCK = re.compile(r"^( *)```([^\n]*)\n(.*?)^ *```", re.M | re.S)
SHELL = ("", "sh", "bash", "text")


@dataclass(frozen=True, kw_only=True)
class Block:
    """One fenced block: its page's name, the line on which it starts, its language, its text."""

    page: str
    line: int
    language: str
    text: str

    @property
    def is_transcript(self) -> bool:
        """Whether it shows commands behind `$` with what they print."""
        return self.text.startswith("$ ")

    def commands(self) -> Iterator[Line]:
        """Yield the commands of a block in a shell's language, without comments and prompts."""
        if self.language not in SHELL:
            return
        rows = self.text.replace("\\\n", " ").splitlines()
        for number, row in enumerate(rows):
            bare = re.sub(r"(^|\s+)#.*", "", row.strip())
            if self.is_transcript and not bare.startswith("$ "):
                continue
            prints = _until_command(rows[number + 1 :]) if self.is_transcript else []
            error = prints[0] if prints and prints[0].startswith("error: ") else ""
            for part in bare.removeprefix("$ ").split(" && "):
                if part.strip():
                    yield Line(block=self, text=part.strip(), error=error, prints=tuple(prints))


@dataclass(frozen=True, kw_only=True)
class Line:
    """One command as it is written; `prints` is what a transcript shows below it, and `error` the
    error among that."""

    block: Block
    text: str
    error: str = ""
    prints: tuple[str, ...] = ()

    @property
    def is_ours(self) -> bool:
        """Whether it calls kilodelta, and is no description of a command."""
        return self.text.startswith("kilodelta ") and not self.is_usage

    @property
    def is_usage(self) -> bool:
        """Whether it describes a command, with brackets or dots for what may stand there."""
        return self.text.startswith("kilodelta ") and bool(USAGE.search(self.text))


def _until_command(rows: list[str]) -> list[str]:
    return list(takewhile(lambda row: not row.startswith("$ "), rows))


def heads(rows: Iterable[str]) -> list[str]:
    """Return the first column of what a command prints, up to the first empty line.

    Values differ from model to model; which facts are told does not.

    Example:
        >>> heads(["out", "file        size", "a  b  4 KB", "result proved  sha256:1", "", "x"])
        ['out', 'file', 'a', 'result proved']
    """
    told = takewhile(str.strip, rows)
    return [re.split(r"\s{2,}", row.strip())[0].rstrip("/") for row in told]


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    text = page.read_text()
    return [
        Block(
            page=page.name,
            line=text.count("\n", 0, match.start()) + 1,
            language=match[2].strip(),
            text=textwrap.dedent(match[3]),
        )
        for match in BLOCK.finditer(text)
    ]


def commands(page: Path) -> Iterator[str]:
    """Yield the command lines of kilodelta on a page."""
    for block in blocks(page):
        for line in block.commands():
            if line.is_ours:
                yield line.text
