"""How a delta shows itself: three lines for a terminal, a small table for a notebook."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

import kilodelta
from kilodelta.format.delta import Delta
from kilodelta.format.targets import Patterns
from tests.support.processes import GOLDEN

FILES = sorted(GOLDEN.parent.rglob("*.kd"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_delta_is_three_short_lines(path: Path) -> None:
    delta = kilodelta.load(path)
    lines = repr(delta).splitlines()
    assert len(lines) == 3
    assert all(len(line) < 250 for line in lines)
    assert lines[0].startswith(f"Delta({delta.manifest.method.name}: rank ")


def hostile() -> Delta:
    """A file whose names would clear a terminal, run a script, or fill a screen."""
    delta = kilodelta.load(GOLDEN / "nola-8.kd")
    base = replace(delta.manifest.base, name="\x1b[2J<script>alert(1)</script>\n" + "x" * 900)
    globs = Patterns(include=("\u202e" + "y" * 900, "<b>*"))
    return replace(delta, manifest=replace(delta.manifest, base=base, patterns=globs))


def test_names_of_a_file_are_cut_and_escaped() -> None:
    shown = repr(hostile())
    assert len(shown.splitlines()) == 3
    assert len(shown) < 600
    assert all(c.isprintable() or c == "\n" for c in shown)


def test_the_table_of_a_notebook() -> None:
    tags: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            tags.append(tag)

    Reader().feed(hostile()._repr_html_())
    assert tags == ["table", *["tr", "th", "td"] * 3]


def test_a_delta_knows_its_file_s_size(tmp_path: Path) -> None:
    delta = kilodelta.load(GOLDEN / "nola-8.kd")
    assert (
        delta.file_size() == delta.save(tmp_path / "x.kd") == (GOLDEN / "nola-8.kd").stat().st_size
    )
