"""Parity: does an artefact compute what the merged model computes, and not what the base does?

The truth is a float64 run of the merged model in torch. How far an artefact may be off is decided
by `kilodelta.verify.parity.gate` from what plain torch shows in the artefact's own precision.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from kilodelta.errors import KiloDeltaError, ProofError
from kilodelta.progress import Event, Progress, silent
from kilodelta.verify.parity.cases import Case, live
from kilodelta.verify.parity.gate import Limit, limit
from kilodelta.verify.parity.metrics import Metrics, compare
from kilodelta.verify.parity.result import Check, Departure, Result
from kilodelta.verify.runners.runner import Arrays, Runner, UnavailableError
from kilodelta.verify.runners.torch_runner import TorchRunner

Locate: TypeAlias = Callable[[Case], Departure | None]


class Truth:
    """What merged and base model give on every case in float64, and plain torch beside them.

    `outputs` names what the model returns, `scores` those of them that are class scores.

    Raises:
        ProofError: merged and base give the same outputs, so no artefact could show the update.
    """

    def __init__(
        self,
        merged: torch.nn.Module,
        base: torch.nn.Module,
        *,
        outputs: Sequence[str],
        scores: Sequence[str] = (),
        cases: Sequence[Case],
        device: str = "cpu",
        progress: Progress = silent,
    ) -> None:
        self.outputs, self.scores = tuple(outputs), frozenset(scores)
        self.cases, self._module, self._device = tuple(cases), merged, device
        self._progress = progress
        self._plain: dict[str, dict[str, tuple[Metrics, ...]]] = {}
        self.merged = self._run(merged, "float64", "merged model")
        self.base = self._run(base, "float64", "base")
        self._changed = [name for name in self.outputs if self._effect(name)]
        if not self._changed:
            raise ProofError(
                "the base and the merged model give the same outputs on these inputs",
                fix="give inputs of the task that the delta was made for",
            )

    def plain(self, precision: str) -> dict[str, tuple[Metrics, ...]]:
        """Plain torch's error in `precision`: by output, one for each case.

        Raises:
            UnavailableError: torch cannot compute the model in this precision here.
        """
        if precision not in self._plain:
            self._plain[precision] = self.errors(self._run(self._module, precision, "merged model"))
        return self._plain[precision]

    def errors(self, results: Sequence[Arrays]) -> dict[str, tuple[Metrics, ...]]:
        """The error of `results` (one for each case) by output."""
        return {name: tuple(self._compare(name, results)) for name in self.outputs}

    def update(self, results: Sequence[Arrays]) -> dict[str, float]:
        """By output, the share of the update's effect that `results` show.

        The results' change from the base is projected on the merged model's: 1 at the merged
        model, 0 at the base, and above 1/2 exactly where the merged model is the nearer one.
        """
        return {name: self._share(name, results) for name in self._changed}

    def _run(self, module: torch.nn.Module, precision: str, what: str) -> tuple[Arrays, ...]:
        runner = TorchRunner(module, self.outputs, precision=precision, device=self._device)
        results = []
        for done, case in enumerate(self.cases, 1):
            results.append(runner.run(case.batch))
            event = Event(
                stage=f"reference {precision}",
                done=done,
                total=len(self.cases),
                unit="cases",
                detail={"model": what},
            )
            self._progress(event)
        return tuple(results)

    def _compare(self, name: str, results: Sequence[Arrays]) -> list[Metrics]:
        pairs = zip(self._live(name, results), self._live(name, self.merged), strict=True)
        return [compare(a, r, classes=name in self.scores) for a, r in pairs]

    def _live(self, name: str, results: Sequence[Arrays]) -> list[NDArray[Any]]:
        pairs = zip(results, self.cases, strict=True)
        return [live(result[name], case.batch) for result, case in pairs]

    def _flat(self, name: str, results: Sequence[Arrays]) -> NDArray[np.float64]:
        parts = [part.astype(np.float64).ravel() for part in self._live(name, results)]
        return np.concatenate(parts)

    def _effect(self, name: str) -> bool:
        return bool((self._flat(name, self.merged) != self._flat(name, self.base)).any())

    def _share(self, name: str, results: Sequence[Arrays]) -> float:
        actual, merged, base = (
            self._flat(name, arrays) for arrays in (results, self.merged, self.base)
        )
        finite = np.isfinite(actual) & np.isfinite(merged) & np.isfinite(base)
        effect = (merged - base)[finite]
        size = float(effect @ effect)
        return float((actual - base)[finite] @ effect) / size if size else 0.0


def judge(
    runner: Runner,
    truth: Truth,
    *,
    artefact: str,
    precision: str,
    locate: Locate | None = None,
) -> Result:
    """Run one artefact on every case and hold its outputs against the truth.

    `locate` finds, in a case that failed, the layer where the artefact departs.
    """
    describe = functools.partial(Result, artefact=artefact, runner=runner.name, precision=precision)
    try:
        unavailable = runner.available()
        if unavailable is not None:
            return describe(error=unavailable)
        results = [_named(runner.run(case.batch), truth.outputs) for case in truth.cases]
        checks = _checks(truth, results, precision)
    except UnavailableError as error:
        return describe(error=error)
    except KiloDeltaError as error:
        return describe(error=error, broken=True)
    departure = _departure(truth, checks, locate)
    return describe(checks=checks, update=truth.update(results), departure=departure)


def _named(result: Arrays, outputs: Sequence[str]) -> Arrays:
    missing = [name for name in outputs if name not in result]
    if missing:
        raise ProofError(
            f"the artefact has no output {', '.join(missing)}; it has {', '.join(result)}",
            fix="export again: the artefact does not have the model's outputs",
        )
    return result


def _checks(truth: Truth, results: Sequence[Arrays], precision: str) -> tuple[Check, ...]:
    errors, plain = truth.errors(results), truth.plain(precision)
    return tuple(
        check
        for name in truth.outputs
        for check in _output(name, truth, errors[name], plain[name], limit(plain[name], precision))
    )


def _output(
    name: str, truth: Truth, errors: Sequence[Metrics], plain: Sequence[Metrics], most: Limit
) -> list[Check]:
    return [
        Check(
            case=case.name,
            shape=case.shape,
            output=name,
            error=error,
            torch=torch_error,
            limit=most,
        )
        for case, error, torch_error in zip(truth.cases, errors, plain, strict=True)
    ]


def _departure(truth: Truth, checks: Sequence[Check], locate: Locate | None) -> Departure | None:
    failed = {check.case for check in checks if not check.passed}
    case = next((case for case in truth.cases if case.name in failed), None)
    return locate(case) if case is not None and locate is not None else None
