"""Lay out the steps of `kilodelta demo`, with the proof at their end."""

from __future__ import annotations

from kilodelta.report import plots
from kilodelta.report.html import Cell, Column, Page, Section, commands, figure, table
from kilodelta.report.pages.parts import Json
from kilodelta.report.pages.verify import verify_page
from kilodelta.sizes import byte_label


def demo_page(result: Json) -> Page:
    """Lay out the result of `kilodelta demo`."""
    rows = result["summary"]
    accuracy = plots.bars(
        [f"{r['name']} ({byte_label(r['nbytes'])})" for r in rows],
        [100 * r["accuracy"] for r in rows],
        x="test accuracy in %",
        alt="Test accuracy: " + ", ".join(f"{r['name']} {100 * r['accuracy']:.1f} %" for r in rows),
    )
    steps = [
        (
            Cell(text=s["name"]),
            Cell(text=s["said"]),
            Cell(text=f"{s['seconds']:.1f}", value=s["seconds"]),
        )
        for s in result["steps"]
    ]
    columns = [Column(title="step"), Column(title="what came out"), Column(title="s", number=True)]
    lines = [s["command"] for s in result["steps"] if s["command"]]
    proof = verify_page(result["verification"])
    return Page(
        title="kilodelta demo",
        subtitle=str(result["folder"]),
        verdict=proof.verdict,
        sections=[
            Section(title="Right answers", body=figure(accuracy, "Right answers on test texts.")),
            Section(title="Steps", body=table(columns, steps)),
            *[s for s in proof.sections if s.title != "Run it again"],
            Section(title="Run it again", body=commands(lines)),
        ],
    )
