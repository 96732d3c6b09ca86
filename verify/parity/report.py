"""A whole verification: what was proved, what was run, and whether that is what was asked for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from kilodelta.errors import KiloDeltaError, MissingPackageError, ProofError
from kilodelta.verify.parity.result import FAILED, NOT_RUN, STATUSES, Agreement, Json, Result
from kilodelta.verify.parity.tables import Table, agreement_table, parity_table, silent_table
from kilodelta.verify.runners.names import RUNNERS


@dataclass(frozen=True, kw_only=True)
class Report:
    """A whole verification: every artefact in every runner, and what the caller insisted on.

    `required` holds names of `verify/runners/names.py`: `ort` asks for one of `onnxruntime-cpu` and
    `onnxruntime-cuda` to have run. `inputs` is what `rows` inputs were read from.
    """

    results: tuple[Result, ...]
    agreement: tuple[Agreement, ...] = ()
    required: tuple[str, ...] = ()
    inputs: str = ""
    rows: int = 0

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
        """How many runs passed, failed and did not come about, and on what."""
        counts = Counter(result.status for result in self.results)
        told = ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])
        return f"{told}; {self.rows} inputs from {self.inputs}"

    def to_json(self) -> Json:
        """Everything found, fit for strict JSON."""
        failure = self.failure()
        return {
            "passed": failure is None,
            "failure": None if failure is None else failure.what,
            "required": list(self.required),
            "inputs": {"from": self.inputs, "rows": self.rows},
            "results": [result.to_json() for result in self.results],
            "agreement": [agreement.to_json() for agreement in self.agreement],
        }

    def tables(self) -> tuple[Table, ...]:
        """Parity, what gave no outputs, and agreement with the tuned model; none of them empty."""
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
    fixes = [result.error.fix for result in results if result.error is not None]
    return ProofError("\n  ".join(lines), fix=(*fixes, "export again from the merged model")[0])
