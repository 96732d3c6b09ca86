"""Lay out what `kilodelta verify` measured: parity, agreement, and what could not run."""

from __future__ import annotations

from collections.abc import Sequence

from kilodelta.report.html import Cell, Column, Page, Section, paragraph, table
from kilodelta.report.pages.parts import Json, again, digests, legend, number_cell, status_cell
from kilodelta.report.verdict import verdict_of


def verify_page(result: Json) -> Page:
    """Lay out the result of `kilodelta verify`."""
    sections = [
        _parity(result.get("results")),
        _silent(result.get("results")),
        _agreement(result.get("agreement")),
        digests(result),
        again(result),
        legend(["error", "update", "agreement", "divergence"]),
    ]
    return Page(
        title="Verification",
        subtitle=f"base {str(result.get('base', ''))[:23]}…",
        verdict=verdict_of(result),
        sections=[s for s in sections if s is not None],
    )


def _parity(results: Sequence[Json] | None) -> Section | None:
    ran = [r for r in results or () if r["checks"]]
    if not ran:
        return None
    rows = []
    for r in ran:
        for check in r["checks"]:
            error, most = check["error"]["relative_l2"], check["limit"]["relative_l2"]
            share = r["update"].get(check["output"])
            rows.append(
                (
                    Cell(text=r["artefact"], code=True),
                    Cell(text=f"{r['runner']}, {r['precision']}"),
                    Cell(text=check["output"], code=True),
                    Cell(text=f"{check['case']} {'x'.join(map(str, check['shape']))}"),
                    number_cell(error),
                    number_cell(most),
                    Cell(text="" if share is None else f"{float(share):.4f}"),
                    status_cell("passed" if check["passed"] else "failed"),
                )
            )
    columns = [
        Column(title="artefact"),
        Column(title="runner"),
        Column(title="output"),
        Column(title="shape"),
        Column(title="error", number=True),
        Column(title="at most", number=True),
        Column(title="update", number=True),
        Column(title="result"),
    ]
    departures = "".join(
        paragraph(
            f"{r['artefact']} in {r['runner']}: first off at {r['departure']['layer']}"
            f" ({r['departure']['operator']} {r['departure']['node']})"
        )
        for r in ran
        if r.get("departure")
    )
    body = table(columns, rows, sortable=True) + departures
    return Section(title="Parity with the merged model in float64", body=body)


def _silent(results: Sequence[Json] | None) -> Section | None:
    silent = [r for r in results or () if not r["checks"]]
    if not silent:
        return None
    rows = [
        (
            Cell(text=r["artefact"], code=True),
            Cell(text=r["runner"]),
            status_cell(r["status"]),
            Cell(text="; ".join(r["reasons"])),
        )
        for r in silent
    ]
    columns = [Column(title=t) for t in ("artefact", "runner", "status", "why")]
    return Section(title="Without outputs", body=table(columns, rows))


def _agreement(rows: Sequence[Json] | None) -> Section | None:
    if not rows:
        return None
    cells = [
        (
            Cell(text=r["output"], code=True),
            Cell(text=name),
            number_cell(r[name]["top1"]),
            number_cell(r[name]["cosine"]),
            number_cell(r[name]["kl"]),
        )
        for r in rows
        for name in ("merged", "base")
    ]
    columns = [
        Column(title="output"),
        Column(title="model"),
        Column(title="top-1", number=True),
        Column(title="cosine", number=True),
        Column(title="KL", number=True),
    ]
    caption = f"over {rows[0]['rows']} inputs"
    body = table(columns, cells, caption=caption)
    return Section(title="Agreement with the tuned model", body=body)
