"""docs/models.md says what the results of the table say, and those hold nothing wrong."""

from __future__ import annotations

import json

from tests.models.page import STEPS, kind, page, surveyed
from tests.models.table import SURVEY
from tests.support.processes import ROOT

RESULTS = json.loads((ROOT / "tests" / "models" / "results.json").read_text())
ENGINES = surveyed(json.loads(SURVEY.read_text()))
ROWS = {name: row["steps"] for name, row in RESULTS["architectures"].items()}


def test_the_page_is_what_the_results_give() -> None:
    assert (ROOT / "docs" / "models.md").read_text() == page(RESULTS, ENGINES)


def test_a_survey_s_engines_are_marked_as_such() -> None:
    assert len(ENGINES & ROWS.keys()) == len(ENGINES) == 21
    row = {"class": "A", "steps": {"compress": "right"}}
    text = page({"packages": {}, "architectures": {"vit": row}}, ENGINES)
    assert "| vit | `A` | yes | - | - | - | - | - | built |" in text


def test_no_row_is_silently_wrong_and_none_ends_in_an_error_of_others() -> None:
    bad = {name: steps for name, steps in ROWS.items() if kind(steps) in ("WRONG", "TRACEBACK")}
    assert not bad
    assert {step for steps in ROWS.values() for step in steps} <= set(STEPS)


def test_marks_say_what_happened() -> None:
    """Each kind of outcome has a mark of its own, and what was not tried has none of them."""
    steps = {
        "compress": "right",
        "merge": "right: 1 of 3 sizes, an axis is fixed",
        "export": "refused: it is `odd` (fix: none)",
        "verify": "WRONG: y is off by 7",
        "adapter": "TRACEBACK: KeyError: 'x'",
    }
    text = page(
        {"packages": {"torch": "2"}, "architectures": {"a": {"class": "A", "steps": steps}}}
    )
    assert "| a | `A` | yes | yes* | refused | **wrong** | **error** | - | - |" in text
    assert "- a, export: refused: `it is 'odd' (fix: none)`" in text
    assert (
        "Of 1 architectures 0 are right in every step from compress to patch, and 0 as far" in text
    )
    assert kind(steps) == "TRACEBACK"
