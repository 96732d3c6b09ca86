"""Write results as one HTML file that opens without a network, and as JSON beside it.

`write.py` writes both files. `pages/` turns what a command's `--json` prints into sections, one
file for each command; `plots.py` draws them with matplotlib as inline SVG, `html.py` is the frame,
and `verdict.py` says in one line whether the result is good and what to do next. Nothing here
computes: every number comes from the result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kilodelta.lazy import lazy

if TYPE_CHECKING:
    from kilodelta.report.verdict import Verdict as Verdict
    from kilodelta.report.verdict import verdict_of as verdict_of
    from kilodelta.report.write import write_report as write_report

_WHERE = {
    "Verdict": "kilodelta.report.verdict",
    "verdict_of": "kilodelta.report.verdict",
    "write_report": "kilodelta.report.write",
}

__all__ = ["Verdict", "verdict_of", "write_report"]

__getattr__, __dir__ = lazy(__name__, _WHERE)
