"""What verification found, as frozen objects: JSON for machines, tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from kilodelta.errors import KiloDeltaError, MissingPackageError, ProofError
from kilodelta.verify.gate import Limit
from kilodelta.verify.metrics import Metrics, jsonable

Json: TypeAlias = dict[str, Any]

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under a title, for whoever draws tables."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One output in one case: its error, plain torch's in the same precision, and the limit."""

    case: str
    shape: tuple[int, ...]
    output: str
    error: Metrics
    torch: Metrics
    limit: Limit

    @property
    def passed(self) -> bool:
        return self.limit.admits(self.error)

    def to_json(self) -> Json:
        return {
            "case": self.case,
            "shape": list(self.shape),
            "output": self.output,
            "error": self.error.to_json(),
            "torch": self.torch.to_json(),
            "limit": self.limit.to_json(),
            "passed": self.passed,
        }


@dataclass(frozen=True, kw_only=True)
class Departure:
    """The first place in a graph whose value leaves the module's: a layer and its last node."""

    layer: str
    node: str
    operator: str
    relative_l2: float
    limit: float

    def __str__(self) -> str:
        return (
            f"first off at {self.layer} (node {self.node}, {self.operator}): relative L2 "
            f"{self.relative_l2:.2g}, at most {self.limit:.2g}"
        )

    def to_json(self) -> Json:
        return {
            "layer": self.layer,
            "node": self.node,
            "operator": self.operator,
            "relative_l2": jsonable(self.relative_l2),
            "limit": jsonable(self.limit),
        }


@dataclass(frozen=True, kw_only=True)
class Result:
    """One artefact in one runner.

    `update` is, for each output, the part of the fine-tune's effect that is there: 1 at the merged
    model's outputs, 0 at the base's. `error` is why it did not run, or why it broke.
    """

    artefact: str
    runner: str
    precision: str
    checks: tuple[Check, ...] = ()
    update: Mapping[str, float] = field(default_factory=dict)
    error: KiloDeltaError | None = None
    broken: bool = False
    departure: Departure | None = None

    @property
    def status(self) -> str:
        if self.error is not None:
            return FAILED if self.broken else NOT_RUN
        return FAILED if self.reasons() else PASSED

    def reasons(self) -> tuple[str, ...]:
        """Every reason why this failed, worst case first within an output."""
        if self.error is not None:
            return (self.error.what,)
        late = [check for check in self.checks if not check.passed]
        return (*map(_excess, late), *self._absent())

    def _absent(self) -> list[str]:
        return [
            f"{output}: {share:.0%} of the update's effect is there: these are the base's outputs"
            for output, share in self.update.items()
            if share <= 0.5
        ]

    def to_json(self) -> Json:
        return {
            "artefact": self.artefact,
            "runner": self.runner,
            "precision": self.precision,
            "status": self.status,
            "reasons": list(self.reasons()),
            "departure": self.departure.to_json() if self.departure else None,
            "update": {name: jsonable(share) for name, share in self.update.items()},
            "checks": [check.to_json() for check in self.checks],
        }


def _excess(check: Check) -> str:
    shape = "x".join(map(str, check.shape))
    return (
        f"{check.output} at the {check.case} shape {shape}: relative L2 "
        f"{check.error.relative_l2:.2g} (at most {check.limit.relative_l2:.2g}), relative maximum "
        f"{check.error.relative_max:.2g} (at most {check.limit.relative_max:.2g})"
    )


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """One output against the tuned model's, over all inputs: the merged model's and the base's."""

    output: str
    rows: int
    merged: Metrics
    base: Metrics

    def to_json(self) -> Json:
        return {
            "output": self.output,
            "rows": self.rows,
            "merged": self.merged.to_json(),
            "base": self.base.to_json(),
        }


@dataclass(frozen=True, kw_only=True)
class Report:
    """A whole verification: every artefact in every runner, and what the caller insisted on.

    `required` holds runner names, or beginnings of them up to a dash: `onnxruntime` asks for one
    of `onnxruntime-cpu` and `onnxruntime-cuda` to have run.
    """

    results: tuple[Result, ...]
    agreement: tuple[Agreement, ...] = ()
    required: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return self.failure() is None

    def failure(self) -> KiloDeltaError | None:
        """The error to end with: what failed, else what was required and did not run."""
        failed = [result for result in self.results if result.status == FAILED]
        if failed:
            return _failed(failed)
        missed = (self._missed(name) for name in self.required)
        return next((error for error in missed if error is not None), None)

    def _missed(self, name: str) -> KiloDeltaError | None:
        """Why nothing that `name` asks for ran; a missing package stays a missing package."""
        asked = [result for result in self.results if _is(result.runner, name)]
        if any(result.status != NOT_RUN for result in asked):
            return None
        errors = [result.error for result in asked if result.error is not None]
        if not errors:
            return ProofError(
                f"{name} is required, and there is nothing for it to run",
                fix=f"export an artefact that {name} runs, or require another runner",
            )
        kind = MissingPackageError if isinstance(errors[0], MissingPackageError) else ProofError
        return kind(f"{name} is required and did not run: {errors[0].what}", fix=errors[0].fix)

    def to_json(self) -> Json:
        """Everything found, fit for strict JSON."""
        failure = self.failure()
        return {
            "passed": failure is None,
            "failure": None if failure is None else failure.what,
            "required": list(self.required),
            "results": [result.to_json() for result in self.results],
            "agreement": [agreement.to_json() for agreement in self.agreement],
        }

    def tables(self) -> tuple[Table, ...]:
        """Parity, and agreement with the tuned model where that was asked for."""
        parity = Table(
            title="Parity with the merged model in float64",
            columns=_PARITY,
            rows=tuple(row for result in self.results for row in _parity_rows(result)),
        )
        return (parity, _agreement_table(self.agreement)) if self.agreement else (parity,)


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
_AGREEMENT = ("output", "rows", "model", "top-1", "cosine", "KL", "relative L2")


def _is(runner: str, name: str) -> bool:
    return runner == name or runner.startswith(f"{name}-")


def _failed(results: list[Result]) -> ProofError:
    lines = [
        f"{result.artefact} in {result.runner} ({result.precision}): {reason}"
        for result in results
        for reason in (*result.reasons(), *([str(result.departure)] if result.departure else []))
    ]
    fixes = [result.error.fix for result in results if result.error is not None]
    return ProofError("\n  ".join(lines), fix=(*fixes, "export again from the merged model")[0])


def _parity_rows(result: Result) -> list[tuple[str, ...]]:
    head = (result.artefact, result.runner, result.precision)
    if result.error is not None:
        blank = ("",) * (len(_PARITY) - len(head) - 1)
        return [(*head, *blank, f"{result.status}: {result.error.what}")]
    return [(*head, *_check_cells(check, result)) for check in result.checks]


def _check_cells(check: Check, result: Result) -> tuple[str, ...]:
    error = check.error
    share = result.update.get(check.output)
    late = not check.passed or (share is not None and share <= 0.5)
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


def _agreement_table(agreement: tuple[Agreement, ...]) -> Table:
    rows = tuple(
        (entry.output, str(entry.rows), model, *_agreement_cells(metrics))
        for entry in agreement
        for model, metrics in (("merged", entry.merged), ("base", entry.base))
    )
    return Table(title="Agreement with the tuned model", columns=_AGREEMENT, rows=rows)


def _agreement_cells(metrics: Metrics) -> tuple[str, ...]:
    return (
        _share(metrics.top1),
        _share(metrics.cosine),
        _cell(metrics.kl),
        _cell(metrics.relative_l2),
    )


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
