"""The threat model names tests that exist, and each fails where its guard is removed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import ROOT
from tests.support.unguarded import GUARDS

PAGE = ROOT / "docs" / "security.md"
_NODE = re.compile(r"`((?:tests/[\w/]+\.py)?::[\w:]+(?:\[[\w-]+\])?)`")


def rows() -> list[tuple[str, list[str]]]:
    """What an attacker tries, and the tests that are named for it, by row of the table."""
    found = []
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and len(cells) == 4 and cells[0] != "an attacker can":
            file, nodes = "", []
            for node in _NODE.findall(cells[3]):
                file = node.partition("::")[0] or file
                nodes.append(f"{file}::{node.partition('::')[2]}")
            found.append((f"{cells[0]}: {cells[1]}", nodes))
    return found


def test_every_row_names_a_test_whose_guard_can_be_removed() -> None:
    assert len(rows()) > 20
    for row, nodes in rows():
        assert set(nodes) & GUARDS.keys(), f"{row}: none of {nodes} has a guard to remove"


@pytest.mark.parametrize("node", sorted({n for _, nodes in rows() for n in nodes} | GUARDS.keys()))
def test_every_test_that_is_named_exists(node: str) -> None:
    file, _, name = node.partition("::")
    text = (ROOT / file).read_text()
    for part in name.partition("[")[0].split("::"):
        assert re.search(rf"^ *(def|class) {part}\b", text, re.MULTILINE), node


def _committed(kind: str) -> tuple[Path, dict[str, Any]]:
    (place,) = (ROOT / "benchmarks" / "results").glob(f"{kind}-*.json")
    return place, json.loads(place.read_text())


def test_the_figures_of_the_fuzz_are_those_of_its_committed_run() -> None:
    place, facts = _committed("fuzz")
    rows = facts["surfaces"]
    whole = [row["surface"] for row in rows if row["inputs"] >= 10_000]
    text = " ".join(PAGE.read_text().split())
    assert place.name in text
    assert f"10,000 inputs on {len(whole)} of the {len(rows)} surfaces" in text
    for row in rows:
        if row["surface"] not in whole:
            assert f"{row['inputs']:,} on `{row['surface']}`" in text
        assert not row["tracebacks"] or "mended" in row["note"], row["surface"]
        assert row["hangs"] == 0, row["surface"]
        # Pixels take more memory than the file that packs them; how many there may be is stated.
        assert row["over_memory"] == (1 if row["surface"] == "media" else 0), row["surface"]


def test_the_figures_of_the_faults_are_those_of_their_committed_run() -> None:
    place, facts = _committed("faults")
    text = " ".join(PAGE.read_text().split())
    assert place.name in text
    for fault, word in (("kill", "kills"), ("full disk", "full disks"), ("pair", "pairs")):
        rows = [row for row in facts["rows"] if row["fault"] == fault]
        assert f"{sum(row['trials'] for row in rows):,} {word}" in text
        assert len({row["command"] for row in rows}) == 9, fault
    for row in facts["rows"]:
        assert not any(row[k] for k in ("mixtures", "lost", "leftovers", "tracebacks")), row


@pytest.mark.slow
def test_every_test_fails_without_its_guard() -> None:
    command = [sys.executable, "-m", "tests.support.unguarded"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("fails without its guard") == len(GUARDS)
