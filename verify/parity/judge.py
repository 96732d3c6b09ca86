"""Judge one runner: does it compute what the merged model computes, and not what the base does?"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from kilodelta.errors import KiloDeltaError, ProofError
from kilodelta.verify.parity.cases import Case
from kilodelta.verify.parity.gate import limit, widened
from kilodelta.verify.parity.metrics import Metrics
from kilodelta.verify.parity.reference import Reference
from kilodelta.verify.parity.result import Check, Departure, Result
from kilodelta.verify.runners.runner import Arrays, Runner, UnavailableError

Locate: TypeAlias = Callable[[Case], Departure | None]
"""Finds, in a case that failed, the layer where an artefact departs."""

_Errors: TypeAlias = Mapping[str, tuple[Metrics, ...]]


def judge(
    runner: Runner,
    reference: Reference,
    *,
    artefact: str,
    precision: str,
    locate: Locate | None = None,
) -> Result:
    """Run one artefact on every case and hold its outputs against the reference.

    Args:
        runner: what runs it.
        reference: what it must compute.
        artefact: its name, for reports.
        precision: the precision that it claims, by which it is judged.
        locate: looks into it where a case fails.
    """
    describe = functools.partial(Result, artefact=artefact, runner=runner.name, precision=precision)
    try:
        unavailable = runner.available()
        if unavailable is not None:
            return describe(error=unavailable)
        results = [_named(runner.run(case.batch), reference.outputs) for case in reference.cases]
        checks = _checks(reference, results, precision)
        update = reference.update(results, precision)
    except UnavailableError as error:
        return describe(error=error)
    except KiloDeltaError as error:
        return describe(error=error, broken=True)
    departure = _departure(reference, checks, locate)
    unseen = not update and all(check.passed for check in checks)
    return describe(checks=checks, update=update, unseen=unseen, departure=departure)


def _named(result: Arrays, outputs: Sequence[str]) -> Arrays:
    missing = [name for name in outputs if name not in result]
    if missing:
        raise ProofError(
            f"the artefact has no output {', '.join(missing)}; it has {', '.join(result)}",
            fix="export again: the artefact does not have the model's outputs",
        )
    return {name: result[name] for name in outputs}


def _checks(reference: Reference, results: Sequence[Arrays], precision: str) -> tuple[Check, ...]:
    errors, plain = reference.errors(results), reference.plain(precision)
    checks = _against(reference, errors, precision, plain)
    if all(check.passed for check in checks):
        return checks
    # A second look, only where it matters: it costs another pass in torch. Runtimes add the terms
    # of a long average one after another, and torch does so when it is told to.
    in_order = reference.plain(precision, in_order=True)
    both = {name: (*plain[name], *in_order[name]) for name in reference.outputs}
    return _conditioned(reference, _against(reference, errors, precision, both), precision)


def _conditioned(
    reference: Reference, checks: Sequence[Check], precision: str
) -> tuple[Check, ...]:
    """Admit, in each case that failed, a multiple of what rounding noise does to its outputs."""
    failed = {check.case for check in checks if not check.passed}
    spreads = {c.name: reference.spread(c, precision) for c in reference.cases if c.name in failed}
    return tuple(
        replace(check, limit=widened(check.limit, spreads[check.case].get(check.output, ())))
        if check.case in spreads
        else check
        for check in checks
    )


def _against(
    reference: Reference, errors: _Errors, precision: str, plain: _Errors
) -> tuple[Check, ...]:
    return tuple(
        Check(
            case=case.name,
            shape=case.shape,
            output=name,
            error=error,
            torch=torch,
            limit=limit(plain[name], precision),
        )
        for name in reference.outputs
        for case, error, torch in zip(
            reference.cases, errors[name], plain[name][: len(reference.cases)], strict=True
        )
        if reference.is_defined(name, case)
    )


def _departure(
    reference: Reference, checks: Sequence[Check], locate: Locate | None
) -> Departure | None:
    failed = {check.case for check in checks if not check.passed}
    case = next((case for case in reference.cases if case.name in failed), None)
    return locate(case) if case is not None and locate is not None else None
