"""Lay out the manifest of `kilodelta export`: its files, and the model's inputs and outputs."""

from __future__ import annotations

from kilodelta.report.html import Cell, Column, Page, Section, table
from kilodelta.report.pages.parts import Json, again, digests
from kilodelta.sizes import byte_label


def export_page(result: Json) -> Page:
    """Lay out the result of `kilodelta export`: its manifest."""
    rows = [
        (
            Cell(text=str(a["kind"])),
            Cell(text=str(a["dtype"])),
            Cell(text=file["file"], code=True),
            Cell(text=byte_label(file["nbytes"]), value=file["nbytes"]),
            Cell(text=file["sha256"], code=True),
        )
        for a in result["artefacts"]
        for file in a["files"]
    ]
    columns = [
        Column(title="kind"),
        Column(title="precision"),
        Column(title="file"),
        Column(title="bytes", number=True),
        Column(title="SHA-256"),
    ]
    ports = [
        (
            Cell(text=port["name"], code=True),
            Cell(text=direction),
            Cell(text=str(port["dtype"])),
            Cell(text=" x ".join(map(str, port["shape"]))),
        )
        for a in result["artefacts"][:1]
        for direction, key in (("input", "inputs"), ("output", "outputs"))
        for port in a[key]
    ]
    heads = [Column(title=t) for t in ("tensor", "direction", "type", "shape")]
    sections = [
        Section(title="Files", body=table(columns, rows, sortable=True)),
        Section(title="Inputs and outputs", body=table(heads, ports)),
        digests({"base": result["base"]["root"], "result": result["result"]["root"]}),
        again(result),
    ]
    return Page(
        title=f"Export of {result['base']['name'] or 'a model'}",
        subtitle=f"made by {result['tool']}",
        sections=[s for s in sections if s is not None],
    )
