"""A whole verification's outputs: what was run, and whether that is what was asked for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from kilodelta.errors import KiloDeltaError, MissingPackageError, ProofError
from kilodelta.verify.parity.result import FAILED, NOT_RUN, STATUSES, Agreement, Json, Result
from kilodelta.verify.parity.tables import Table, agreement_table, parity_table, silent_table
from kilodelta.verify.runners.names import RUNNERS


@dataclass(frozen=True, kw_only=True)
class Report:
    """Every artefact in every runner, and what the caller insisted on.

    Attributes:
        results: one per artefact and runner.
        agreement: with the tuned model, per output; empty if none was given.
        required: names of `kilodelta.verify.runners.names`: `ort` asks that `onnxruntime-cpu` or
            `onnxruntime-cuda` has run.
        inputs: what the inputs were read from.
        rows: how many there are.
        notes: sentences about shapes that were not compared as the profiles say.
    """

    results: tuple[Result, ...]
    agreement: tuple[Agreement, ...] = ()
    required: tuple[str, ...] = ()
    inputs: str = ""
    rows: int = 0
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing failed and everything required has run."""
        return self.failure() is None

    def failure(self) -> KiloDeltaError | None:
        """Return the error to end with: what failed, else what was required and did not run."""
        failed = [result for result in self.results if result.status == FAILED]
        if failed:
            return _failed(failed)
        missed = (self._missed(name) for name in self.required)
        return next((error for error in missed if error is not None), None)

    def _missed(self, name: str) -> KiloDeltaError | None:
        """Return why nothing that `name` asks for ran; a missing package stays one."""
        asked = [result for result in self.results if result.runner in RUNNERS[name]]
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

    def summary(self) -> str:
        """Return how many runs passed, failed and did not take place, and on what."""
        counts = Counter(result.status for result in self.results)
        shown = ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])
        return f"{shown}; {self.rows} inputs from {self.inputs}"

    def to_json(self) -> Json:
        """Return everything, fit for strict JSON."""
        failure = self.failure()
        return {
            "passed": failure is None,
            "failure": None if failure is None else failure.what,
            "required": list(self.required),
            "inputs": {"from": self.inputs, "rows": self.rows},
            "notes": list(self.notes),
            "results": [result.to_json() for result in self.results],
            "agreement": [agreement.to_json() for agreement in self.agreement],
        }

    def tables(self) -> tuple[Table, ...]:
        """Return the tables that have rows: parity, what did not run, agreement."""
        all_of_them = (
            parity_table(self.results),
            silent_table(self.results),
            agreement_table(self.agreement),
        )
        return tuple(table for table in all_of_them if table.rows)


def _failed(results: list[Result]) -> ProofError:
    lines = [
        f"{result.artefact} in {result.runner} ({result.precision}): {reason}"
        for result in results
        for reason in (*result.reasons(), *([str(result.departure)] if result.departure else []))
    ]
    return ProofError("\n  ".join(lines), fix=results[0].fix)
