"""Lay results out as rows of text, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kilodelta.verify.parity.result import Agreement, Result


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under a title.

    Attributes:
        title: the line above.
        columns: headings.
        rows: as many cells each as columns.
        right: numbers of the columns that are set flush right.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: tuple[int, ...] = ()


_PARITY = ("artefact", "runner", "in", "at", "error", "at most", "top-1", "update", "result")
_SILENT = ("runner", "status", "why, and what to do", "artefacts")
_AGREEMENT = ("output", "rows", "model", "top-1", "cosine", "KL")


def parity_table(results: Sequence[Result]) -> Table:
    """Return one row per artefact and runner, at the shape where it is nearest to its limit."""
    rows = (
        (result.artefact, result.runner, result.precision, *_worst_cells(result))
        for result in results
        if result.checks
    )
    return Table(
        title="Parity with the merged model in float64: relative L2 at the worst shape",
        columns=_PARITY,
        rows=tuple(rows),
        right=tuple(range(_PARITY.index("error"), _PARITY.index("result"))),
    )


def silent_table(results: Sequence[Result]) -> Table:
    """Return one row per runner without outputs and reason, with all that it was to run."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for result in results:
        if result.error is not None:
            why = f"{result.error.what}; {result.error.fix}"
            groups.setdefault((result.runner, result.status, why), []).append(result.artefact)
    rows = ((*key, ", ".join(artefacts)) for key, artefacts in groups.items())
    return Table(title="Without outputs", columns=_SILENT, rows=tuple(rows))


def _worst_cells(result: Result) -> tuple[str, ...]:
    worst = max(result.checks, key=lambda check: check.strain)
    top1 = [check.error.top1 for check in result.checks if check.error.top1 is not None]
    return (
        "x".join(map(str, worst.shape)),
        _cell(worst.error.relative_l2),
        _cell(worst.limit.relative_l2),
        _share(min(top1, default=None)),
        _share(min(result.update.values(), default=None)),
        result.status,
    )


def agreement_table(agreement: Sequence[Agreement]) -> Table:
    """Return how close merged model and base come to the tuned one."""
    rows = tuple(
        (
            entry.output,
            str(entry.rows),
            model,
            _share(near.top1),
            _share(near.cosine),
            _cell(near.kl),
        )
        for entry in agreement
        for model, near in (("merged", entry.merged), ("base", entry.base))
    )
    title = "Agreement with the tuned model"
    return Table(title=title, columns=_AGREEMENT, rows=rows, right=(1, 3, 4, 5))


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
