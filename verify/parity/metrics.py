"""How far an output is from its reference: seven numbers, all taken in float64.

Values that are not finite have a defined meaning. Where both arrays hold the same infinity, or
both hold NaN, the error is zero; where only one does, or they differ, it is infinite. Nothing here
returns NaN or warns.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kilodelta.errors import ProofError

Float64: TypeAlias = NDArray[np.float64]
Number: TypeAlias = float | str | None


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Distances of one output from its reference.

    `max_abs`, `mean_abs`, `p99_abs`: absolute errors; the 99th percentile is an error that occurs.
    `relative_l2`: |actual - reference| / |reference|; 0 where both are zero, infinite where only
    the reference is. `relative_max`: `max_abs` over the reference's largest magnitude, likewise.
    `cosine`: the mean over rows (the last axis); a row counts 1 where both are zero, 0 where one
    is, or where they disagree about a value that is not finite. `top1`: the share of rows whose
    winner is a winner of the reference's row; a tie in the reference may be broken either way.
    `kl`: mean over rows of KL(reference || actual) of the softmax, in nats. `top1` and `kl` are
    None for outputs that are not class scores.
    """

    max_abs: float
    mean_abs: float
    p99_abs: float
    relative_l2: float
    relative_max: float
    cosine: float
    top1: float | None
    kl: float | None

    def to_json(self) -> dict[str, Number]:
        """The numbers by name; infinities as the string "inf", which strict JSON lacks."""
        return {name: jsonable(value) for name, value in asdict(self).items()}


def jsonable(value: float | None) -> Number:
    """A number as strict JSON can hold it."""
    return value if value is None or np.isfinite(value) else str(value)


def compare(actual: NDArray[Any], reference: NDArray[Any], *, classes: bool = False) -> Metrics:
    """Measure `actual` against `reference` of the same shape; `classes`: the last axis is scores.

    Raises:
        ProofError: the shapes differ.
    """
    _same_shape(actual, reference)
    a, r = actual.astype(np.float64), reference.astype(np.float64)
    error = absolute_error(a, r)
    return Metrics(
        max_abs=_largest(error),
        mean_abs=float(error.mean()) if error.size else 0.0,
        p99_abs=float(np.quantile(error, 0.99, method="higher")) if error.size else 0.0,
        relative_l2=_ratio(_norm(error), _norm(_finite(r))),
        relative_max=_ratio(_largest(error), _largest(np.abs(_finite(r)))),
        cosine=_cosine(a, r, error),
        top1=_top1(a, r, error) if classes else None,
        kl=_kl(a, r) if classes else None,
    )


def absolute_error(a: Float64, r: Float64) -> Float64:
    """|a - r|, 0 where both are the same infinity or both NaN, else infinite where not finite."""
    same = (a == r) | (np.isnan(a) & np.isnan(r))
    finite = np.isfinite(a) & np.isfinite(r)
    difference = np.abs(np.where(finite, a, 0.0) - np.where(finite, r, 0.0))
    return np.where(same, 0.0, np.where(finite, difference, np.inf))


def _same_shape(actual: NDArray[Any], reference: NDArray[Any]) -> None:
    if actual.shape != reference.shape:
        raise ProofError(
            f"an output has shape {actual.shape}, the reference {reference.shape}",
            fix="export again: the artefact does not have the model's outputs",
        )


def _finite(x: Float64) -> Float64:
    return np.where(np.isfinite(x), x, 0.0)


def _largest(x: Float64) -> float:
    return float(x.max()) if x.size else 0.0


def _norm(x: Float64) -> float:
    """The Euclidean norm, scaled so that squares neither overflow nor vanish."""
    scale = _largest(np.abs(x))
    if scale == 0.0 or np.isinf(scale):
        return scale
    return scale * float(np.sqrt(np.sum(np.square(x / scale))))


def _ratio(error: float, size: float) -> float:
    if error == 0.0:
        return 0.0
    return error / size if size else float("inf")


def _cosine(a: Float64, r: Float64, error: Float64) -> float:
    if not error.size:
        return 1.0
    ua, ur = _unit_rows(a), _unit_rows(r)
    cosines = np.where(ua.any(-1) | ur.any(-1), np.clip((ua * ur).sum(-1), -1.0, 1.0), 1.0)
    return float(np.where(np.isinf(np.atleast_1d(error)).any(-1), 0.0, cosines).mean())


def _unit_rows(x: Float64) -> Float64:
    """Rows at length 1, zero rows as they are; two steps, so that no square overflows."""
    rows: Float64 = np.atleast_1d(_finite(x))
    for order in (np.inf, 2):
        norm: Float64 = np.linalg.norm(rows, ord=order, axis=-1, keepdims=True)
        rows = np.divide(rows, norm, where=norm != 0.0, out=rows.copy())
    return rows


def _top1(a: Float64, r: Float64, error: Float64) -> float:
    if not a.size:
        return 1.0
    winner = np.argmax(a, axis=-1)[..., None]
    won = np.take_along_axis(r, winner, axis=-1)[..., 0] == r.max(axis=-1)
    return float(np.mean(won | (error == 0.0).all(axis=-1)))


def _log_softmax(x: Float64) -> Float64:
    shifted: Float64 = x - x.max(axis=-1, keepdims=True)
    normaliser: Float64 = np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted - normaliser


def _kl(a: Float64, r: Float64) -> float:
    """Mean KL over rows; rows that are equal count 0, rows without a softmax are infinite."""
    if not a.size:
        return 0.0
    with np.errstate(all="ignore"):
        log_a, log_r = _log_softmax(a), _log_softmax(r)
        terms = np.where(np.exp(log_r) == 0.0, 0.0, np.exp(log_r) * (log_r - log_a))
    rows = terms.sum(axis=-1)
    equal = (absolute_error(a, r) == 0.0).all(axis=-1)
    rows = np.where(equal, 0.0, np.where(np.isnan(rows), np.inf, rows))
    return max(0.0, float(rows.mean()))
