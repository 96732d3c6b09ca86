"""Tiny architectures through every step: each row of the table comes out as it was recorded."""

from __future__ import annotations

import json
from collections.abc import Container
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from tests.models.architectures import TABLE, Architecture
from tests.models.steps import USUAL, run
from tests.support.processes import ROOT

ROWS = json.loads((ROOT / "tests" / "models" / "results.json").read_text())["architectures"]
QUICK = tuple(a for a in TABLE if a.quick and a.name in ROWS)


def test_the_table_is_whole() -> None:
    assert len({a.name for a in TABLE}) == len(TABLE) >= 100
    assert [a.name for a in TABLE if a.name in ROWS] == list(ROWS)
    assert all(ROWS[a.name]["class"] == a.model for a in TABLE if a.name in ROWS)
    assert QUICK


@pytest.mark.parametrize("architecture", QUICK, ids=lambda a: a.name)
def test_a_spread_is_compressed_and_merged(architecture: Architecture, tmp_path: Path) -> None:
    as_recorded(architecture, tmp_path, ("compress", "merge"))


@pytest.mark.parametrize("name", ["bert-bare"])
def test_cheap_architectures_go_through_every_step(name: str, tmp_path: Path) -> None:
    [architecture] = [a for a in TABLE if a.name == name]
    as_recorded(architecture, tmp_path, USUAL)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [a for a in TABLE if a.name in ROWS], ids=lambda a: a.name)
def test_architectures_go_through_every_step(architecture: Architecture, tmp_path: Path) -> None:
    as_recorded(architecture, tmp_path, USUAL)


def as_recorded(architecture: Architecture, folder: Path, steps: Container[str]) -> None:
    """Take an architecture through steps again: each ends as it did when the page was made.

    Steps that a row was not taken through are left out here as well.
    """
    recorded = ROWS[architecture.name]["steps"]
    happened = run(architecture, folder, [step for step in recorded if step in steps])
    assert {step: text.partition(":")[0] for step, text in happened.items()} == {
        step: text.partition(":")[0] for step, text in recorded.items() if step in steps
    }, happened
