"""Lay out the table of `kilodelta fleet status`, under its verdict."""

from __future__ import annotations

from urllib.parse import quote

from kilodelta.report.html import Cell, Column, Page, Section, table
from kilodelta.report.pages.parts import Json, legend, status_cell
from kilodelta.report.verdict import AMBER, GREEN, RED, Level, Verdict
from kilodelta.sizes import byte_label


def _link(result: Json, row: Json) -> str:
    """Return where a row's own report is, seen from the page; empty where there is none."""
    report = row.get("report", "")
    return quote(f"{result.get('folder', '.')}/{report}") if report else ""


def fleet_page(result: Json) -> Page:
    """Lay out the result of `kilodelta fleet status`: fine-tunes by target, the worst first."""
    counts = ", ".join(f"{n} {name}" for name, n in result["counts"].items() if n)
    bad = result["counts"].get("failed", 0) + result["counts"].get("not begun", 0)
    left = result["counts"].get("open", 0)
    level: Level = RED if bad else AMBER if left else GREEN
    advice = "mend what is named below and run the fleet again" if bad else ""
    rows = [
        (
            Cell(text=row["fine_tune"]),
            Cell(text=row["target"]),
            status_cell("passed" if row["status"] == "done" else row["status"]),
            Cell(
                text="" if row["agreement"] is None else f"{row['agreement']:.4f}",
                value=-1.0 if row["agreement"] is None else row["agreement"],
            ),
            Cell(text=byte_label(row["nbytes"]) if row["nbytes"] else "", value=row["nbytes"]),
            Cell(
                text="" if row["seconds"] is None else f"{row['seconds']:.1f}",
                value=row["seconds"] or 0.0,
            ),
            Cell(text=row.get("parity", "")),
            Cell(text=row["place"], code=True, link=_link(result, row)),
            Cell(text=row["why"]),
        )
        for row in result["rows"]
    ]
    columns = [
        Column(title="fine-tune"),
        Column(title="target"),
        Column(title="status"),
        Column(title="agreement", number=True),
        Column(title="bytes", number=True),
        Column(title="s", number=True),
        Column(title="parity"),
        Column(title="place"),
        Column(title="why"),
    ]
    body = table(columns, rows, sortable=True)
    return Page(
        title="Fleet",
        subtitle=str(result["out"]),
        verdict=Verdict(level=level, text=counts or "nothing to do", advice=advice),
        sections=[Section(title="Fine-tunes by target", body=body), legend(["agreement"])],
    )
