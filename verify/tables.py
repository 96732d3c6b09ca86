"""Results as rows of text, for whoever draws tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kilodelta.verify.result import FAILED, NEARER_BASE, PASSED, Agreement, Check, Result


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under a title; `right` holds the numbers of the columns set flush right."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: tuple[int, ...] = ()


_PARITY = (
    "artefact",
    "runner",
    "precision",
    "case",
    "output",
    "relative L2",
    "torch",
    "at most",
    "max abs",
    "cosine",
    "top-1",
    "KL",
    "update",
    "result",
)
_AGREEMENT = ("output", "rows", "model", "top-1", "cosine", "KL")


def parity_table(results: Sequence[Result]) -> Table:
    """A row for each output in each case."""
    rows = (
        (result.artefact, result.runner, result.precision, *_check_cells(check, result))
        for result in results
        for check in result.checks
    )
    return Table(
        title="Parity with the merged model in float64",
        columns=_PARITY,
        rows=tuple(rows),
        right=tuple(range(_PARITY.index("relative L2"), _PARITY.index("result"))),
    )


def silent_table(results: Sequence[Result]) -> Table:
    """A row for each artefact that gave no outputs: not run, or broken."""
    rows = (
        (result.artefact, result.runner, result.status, result.error.what, result.error.fix)
        for result in results
        if result.error is not None
    )
    columns = ("artefact", "runner", "status", "why", "how to mend it")
    return Table(title="Without outputs", columns=columns, rows=tuple(rows))


def _check_cells(check: Check, result: Result) -> tuple[str, ...]:
    error = check.error
    share = result.update.get(check.output)
    late = not check.passed or (share is not None and share <= NEARER_BASE)
    return (
        f"{check.case} {'x'.join(map(str, check.shape))}",
        check.output,
        _cell(error.relative_l2),
        _cell(check.torch.relative_l2),
        _cell(check.limit.relative_l2),
        _cell(error.max_abs),
        _share(error.cosine),
        _share(error.top1),
        _cell(error.kl),
        _share(share),
        FAILED if late else PASSED,
    )


def agreement_table(agreement: Sequence[Agreement]) -> Table:
    """How near merged model and base come to the tuned one."""
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
