"""Records of a fleet's results, which other machines wrote, are read as strangers' files."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from kilodelta.fleet import status
from kilodelta.fleet.record import RECORD, read_record
from kilodelta.fleet.status import _agreement, _answers

GOOD = {"files": {}, "key": {}, "result": {"after": {"agreement": 1}}}


def test_a_record_is_a_plain_file(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text(json.dumps(GOOD))
    (tmp_path / RECORD).symlink_to("real.json")
    assert read_record(tmp_path) is None
    (tmp_path / RECORD).unlink()
    os.mkfifo(tmp_path / RECORD)
    os.mkfifo(tmp_path / "run.json")
    assert read_record(tmp_path) is None
    assert _answers(tmp_path) == ({}, {})


@pytest.mark.parametrize(
    "text",
    ['{"failed": ' + "[" * 100_000, '{"failed": 7}', '{"failed": [], "skipped": []}', "9" * 9999],
)
def test_a_damaged_note_of_a_run_costs_its_reasons_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    assert _answers(tmp_path) == ({}, {})


def test_a_number_beyond_floats_is_no_agreement(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(json.dumps(GOOD))
    assert _agreement(tmp_path) == 1.0
    huge = {**GOOD, "result": {"after": {"agreement": 10**400}}}
    (tmp_path / RECORD).write_text(json.dumps(huge))
    assert _agreement(tmp_path) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, 10**400, "1", None])
def test_a_number_of_a_damaged_record_is_none(value: Any) -> None:
    assert status._number(value) is None
    assert status._number(3) == 3.0
