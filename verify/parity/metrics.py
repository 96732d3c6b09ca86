"""Measure how far an output is from its reference; everything is computed in float64.

Values that are not finite have a defined meaning. Where both arrays hold the same infinity, or both
hold NaN, the error is zero; where only one does, or they differ, it is infinite. The largest finite
value of a float type counts as infinity, because models write `torch.finfo(dtype).min` where they
mean minus infinity and it differs from precision to precision. Nothing here returns NaN or warns.

Integers and booleans (labels, masks) have no distance: an element is right or wrong, and both
relative errors are the share of wrong elements.

`Metrics` defines what top-1, KL and cosine mean in this project. `compress` needs gradients and
has them in torch (`compress.distill.learn.comparisons`); tests/verify/test_one_measure.py holds the
two equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kilodelta.errors import ProofError

Float64: TypeAlias = NDArray[np.float64]
Number: TypeAlias = float | str | None

BLOCK = 1 << 22
"""Elements compared at a time, so that temporaries stay at some 200 MB for outputs of any size."""

# The largest finite values of float16, bfloat16 and float32; float64's is found by itself.
_LARGEST = (65504.0, 3.3895313892515355e38, 3.4028234663852886e38, 1.7976931348623157e308)


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Distances of one output from its reference.

    The reference is the teacher where a student is measured, and the float64 model where an
    artefact is.

    Attributes:
        max_abs: the largest absolute error.
        mean_abs: the mean absolute error.
        p99_abs: the 99th percentile of the absolute errors; an error that occurs.
        relative_l2: |actual - reference| / |reference| in the Euclidean norm; 0 where both are
            zero, infinite where only the reference is.
        relative_max: `max_abs` over the reference's largest magnitude, likewise.
        cosine: mean over rows (the last axis). A row counts 1 where both are zero, 0 where one is
            or where they disagree about a value that is not finite.
        top1: share of rows whose largest element is a largest element of the reference's row, so
            that a tie in the reference may be broken either way; None unless they are class scores.
        kl: mean over rows of KL(softmax(reference) || softmax(actual)) in nats; None likewise.
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
        """Return the numbers by name; infinities as the text "inf", which strict JSON lacks."""
        return {name: jsonable(value) for name, value in asdict(self).items()}


def jsonable(value: float | None) -> Number:
    """Return a number as strict JSON can hold it."""
    return value if value is None or np.isfinite(value) else str(value)


def are_all_nan(outputs: Iterable[Mapping[str, NDArray[Any]]]) -> bool:
    """Return whether no number at all was computed: every float of every output is NaN.

    Args:
        outputs: arrays by name, one mapping for each case.
    """
    floats = [a for arrays in outputs for a in arrays.values() if a.dtype.kind == "f" and a.size]
    return bool(floats) and all(np.isnan(array).all() for array in floats)


NO_REFERENCE = (
    "the model computes nothing but NaN in float64, which artefacts are compared with",
    "its code overflows there, as where it adds the least number of a type twice; give a module "
    "without it by --model",
)
"""What is wrong with a model whose outputs are all NaN, and how to go on."""


def compare(actual: NDArray[Any], reference: NDArray[Any], *, classes: bool = False) -> Metrics:
    """Measure `actual` against `reference`.

    Args:
        actual: any shape and dtype.
        reference: of the same shape. If it holds integers or booleans, elements are right or wrong.
        classes: the last axis holds class scores, so `top1` and `kl` are computed as well.

    Raises:
        ProofError: the shapes differ.

    Example:
        >>> metrics = compare(np.float32([3, 4]), np.float32([3, 0]))
        >>> metrics.max_abs, round(metrics.relative_l2, 3), metrics.cosine
        (4.0, 1.333, 0.6)
    """
    if actual.shape != reference.shape:
        raise ProofError(
            f"an output has shape {actual.shape}, the reference {reference.shape}",
            fix="export again: the artefact does not have the model's outputs",
        )
    if reference.dtype.kind in "iub":
        return _exact(actual, reference)
    total = _Total(np.empty(reference.size), classes=classes)
    for a, r in _blocks(actual, reference):
        total.add(a, r)
    return total.metrics()


def absolute_error(a: Float64, r: Float64) -> Float64:
    """Return |a - r| per element: 0 for equal infinities or two NaN, infinite where one is finite.

    Example:
        >>> absolute_error(np.array([1.5, np.nan, np.inf]), np.array([1.0, np.nan, 3.0]))
        array([0.5, 0. , inf])
    """
    # `==` holds for equal infinities, whose difference would be NaN.
    same = (a == r) | (np.isnan(a) & np.isnan(r)) | (_unbounded(a) == _unbounded(r))
    finite = np.isfinite(a) & np.isfinite(r)
    with np.errstate(over="ignore"):  # two finite values may lie further apart than float64 reaches
        difference = np.abs(np.where(finite, a, 0.0) - np.where(finite, r, 0.0))
    return np.where(same, 0.0, np.where(finite, difference, np.inf))


def _unbounded(x: Float64) -> Float64:
    """Replace the largest finite values of the float types by infinity, sign kept."""
    if np.abs(x).max(initial=0.0) < min(_LARGEST):  # one pass; not so where one is NaN
        return x
    return np.where(np.isin(np.abs(x), _LARGEST), np.copysign(np.inf, x), x)


def _blocks(actual: NDArray[Any], reference: NDArray[Any]) -> Iterator[tuple[Float64, Float64]]:
    """Yield both arrays as float64 `(rows, width)`, some rows at a time."""
    width = reference.shape[-1] if reference.ndim else 1
    rows = (-1, width) if width else (0, 0)
    a, r = actual.reshape(rows), reference.reshape(rows)
    step = max(1, BLOCK // max(width, 1))
    for start in range(0, len(r), step):
        yield (a[start : start + step].astype(np.float64), r[start : start + step].astype(float))


class _Total:
    """Sums over blocks of rows; every metric is a maximum, a norm or a mean over rows."""

    def __init__(self, errors: Float64, *, classes: bool) -> None:
        self._errors, self._filled = errors, 0
        self._rows, self._classes = 0, classes
        self._size = self._norm = self._cosine = self._top1 = self._kl = 0.0

    def add(self, a: Float64, r: Float64) -> None:
        """Add a block, float64 `(rows, width)`."""
        error, reference = absolute_error(a, r), finite(r)
        self._errors[self._filled : self._filled + error.size] = error.ravel()
        self._filled += error.size
        self._rows += len(r)
        self._size = max(self._size, _largest(np.abs(reference)))
        self._norm = float(np.hypot(self._norm, _norm(reference)))
        self._cosine += float(_cosines(a, r, error).sum())
        if self._classes:
            self._top1 += float(_wins(a, r, error).sum())
            self._kl += float(_divergences(a, r, error).sum())

    def metrics(self) -> Metrics:
        """Return the metrics of all blocks."""
        errors, rows = self._errors, self._rows
        largest = _largest(errors)
        relative_l2 = _ratio(_norm(errors), self._norm)
        mean = float(errors.mean()) if errors.size else 0.0
        p99 = (
            float(np.quantile(errors, 0.99, method="higher", overwrite_input=True))
            if errors.size
            else 0.0
        )
        return Metrics(
            max_abs=largest,
            mean_abs=mean,
            p99_abs=p99,
            relative_l2=relative_l2,
            relative_max=_ratio(largest, self._size),
            cosine=self._cosine / rows if rows else 1.0,
            top1=(self._top1 / rows if rows else 1.0) if self._classes else None,
            kl=max(0.0, self._kl / rows if rows else 0.0) if self._classes else None,
        )


def _exact(actual: NDArray[Any], reference: NDArray[Any]) -> Metrics:
    """Measure integers or booleans by the share of elements that differ."""
    share = float(np.mean(actual != reference)) if reference.size else 0.0
    away = np.abs(actual.astype(np.float64) - reference.astype(np.float64))
    return Metrics(
        max_abs=_largest(away),
        mean_abs=float(away.mean()) if away.size else 0.0,
        p99_abs=float(np.quantile(away, 0.99, method="higher")) if away.size else 0.0,
        relative_l2=share,
        relative_max=share,
        cosine=1.0 - share,
        top1=None,
        kl=None,
    )


def finite(x: Float64) -> Float64:
    """Return `x` with 0 in place of NaN, infinities and the largest values of the float types."""
    x = _unbounded(x)
    return np.where(np.isfinite(x), x, 0.0)


def _largest(x: Float64) -> float:
    return float(x.max()) if x.size else 0.0


def _norm(x: Float64) -> float:
    """Compute the Euclidean norm, scaled so that squares neither overflow nor vanish."""
    scale = _largest(np.abs(x))
    if scale == 0.0 or np.isinf(scale):
        return scale
    return scale * float(np.sqrt(np.sum(np.square(x / scale))))


def _ratio(error: float, size: float) -> float:
    if error == 0.0:
        return 0.0
    return error / size if size else float("inf")


def _cosines(a: Float64, r: Float64, error: Float64) -> Float64:
    ua, ur = _unit_rows(a), _unit_rows(r)
    cosines = np.where(ua.any(-1) | ur.any(-1), np.clip((ua * ur).sum(-1), -1.0, 1.0), 1.0)
    return np.where(np.isinf(error).any(-1), 0.0, cosines)


def _unit_rows(x: Float64) -> Float64:
    """Rows at length 1, zero rows as they are; two steps, so that no square overflows."""
    rows = finite(x)
    # By the largest entry first: its square cannot overflow afterwards, nor all vanish.
    for order in (np.inf, 2):
        norm: Float64 = np.linalg.norm(rows, ord=order, axis=-1, keepdims=True)
        rows = np.divide(rows, norm, where=norm != 0.0, out=rows.copy())
    return rows


def _wins(a: Float64, r: Float64, error: Float64) -> NDArray[np.bool_]:
    winner = np.argmax(a, axis=-1)[..., None]
    won = np.take_along_axis(r, winner, axis=-1)[..., 0] == r.max(axis=-1)
    wins: NDArray[np.bool_] = won | (error == 0.0).all(axis=-1)
    return wins


def _log_softmax(x: Float64) -> Float64:
    shifted: Float64 = x - x.max(axis=-1, keepdims=True)
    normaliser: Float64 = np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted - normaliser


def _divergences(a: Float64, r: Float64, error: Float64) -> Float64:
    """KL per row: 0 for rows that are equal, infinite for rows that have no softmax."""
    with np.errstate(all="ignore"):
        log_a, log_r = _log_softmax(_unbounded(a)), _log_softmax(_unbounded(r))
        # 0 log 0 is 0: a class that the reference rules out costs nothing.
        terms = np.where(np.exp(log_r) == 0.0, 0.0, np.exp(log_r) * (log_r - log_a))
    rows = terms.sum(axis=-1)
    return np.where((error == 0.0).all(axis=-1), 0.0, np.where(np.isnan(rows), np.inf, rows))
