"""Compute the two float factors of a LoRA adapter from a target's update, and measure the error.

The factors of every low-rank method are integers (of a compatibility form float32), so those here
are exact but for one rounding each: to the adapter's dtype. The scale is folded in, split between
the two, rank by rank, by a power of two, so that both have entries of like size and float16 neither
overflows nor underflows sooner than it must.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from kilodelta import parallel
from kilodelta.errors import ExportError
from kilodelta.files.dtypes import FLOATS
from kilodelta.format.delta import Delta
from kilodelta.merging.low_rank import truncated
from kilodelta.merging.thin_factors import product_error, product_norm
from kilodelta.progress import Meter, Progress

Matrix = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class FactorPair:
    """B (out, r) and A (r, in) as the adapter holds them, in the bits of its dtype.

    `error` is the Frobenius norm of what rounding and truncation lost, `norm` the update's.
    """

    B: Matrix
    A: Matrix
    error: float
    norm: float

    @property
    def rank(self) -> int:
        return int(self.A.shape[0])


def float_factors(delta: Delta, name: str) -> tuple[Matrix, Matrix]:
    """Compute B (out, r) and A (r, in) of a low-rank update, float64, without ranks that are zero.

    Args:
        delta: bound to its base.
        name: of a target.
    """
    compat = delta.manifest.compat
    if compat is None:
        factors = delta.factors(name)
        return _split(factors.left, factors.right, float(factors.c), factors.e)
    target, q = delta.target(name), delta.coefficients(name)
    left = compat.left(q, target, delta.stream, range(target.matrix[0]))
    return _split(left, compat.right(q, target, delta.stream), compat.scaling, 0)


def _split(left: Matrix, right: Matrix, c: float, e: int) -> tuple[Matrix, Matrix]:
    """c 2^e left @ right as two factors of like size, rank by rank, without ranks of zeros."""
    left, right = left.astype(np.float64), right.astype(np.float64)
    tops = np.abs(left).max(axis=0), np.abs(right).max(axis=1)
    used = (tops[0] > 0) & (tops[1] > 0)
    shares = scales(tops[0][used], tops[1][used], c, e)
    return left[:, used] * shares[0], right[used] * shares[1][:, None]


def scales(left: Matrix, right: Matrix, c: Any, e: Any) -> tuple[Matrix, Matrix]:
    """Compute what to multiply two factors' components by, so that both get entries of like size.

    The scale c 2^e goes to both: c to the left one, and of 2^e to each what suits it. A product
    with c times a power of two is rounded as one with c is.

    Args:
        left: the largest magnitude of each component of the left factor, float64 or integers.
        right: the same of the right factor. Where one is zero, so is the component, and the scales.
        c: the update's integer scale.
        e: its exponent.

    Returns:
        The two multipliers, float64, in the shape of `left`.
    """
    used = (left > 0) & (right > 0)
    tops = c * np.where(used, left, 1), np.where(used, right, 1)
    # Half the logarithm of the ratio: both tops come within a factor of two of each other.
    shift = np.rint((e + np.log2(tops[1]) - np.log2(tops[0])) / 2).astype(np.int64)
    return np.where(used, np.ldexp(c, shift), 0.0), np.where(used, np.ldexp(1.0, e - shift), 0.0)


def exact_pair(delta: Delta, name: str, dtype: str) -> FactorPair:
    """Compute a low-rank update's factors, exact but for the rounding to `dtype`.

    Args:
        delta: bound to its base.
        name: of a target.
        dtype: F32, F16 or BF16.

    Raises:
        ExportError: a factor is beyond the dtype's range.
    """
    B, A = float_factors(delta, name)
    B_bits, B_found = _rounded(B, dtype, name)
    A_bits, A_found = _rounded(A, dtype, name)
    error = product_error((B_found, A_found), (B, A))
    return FactorPair(B=B_bits, A=A_bits, error=error, norm=product_norm(B, A))


def svd_pair(delta: Delta, name: str, rank: int, dtype: str) -> FactorPair:
    """Compute the factors of the nearest update of a rank, for any method.

    Args:
        delta: bound to its base.
        name: of a target.
        rank: of the result, or less where the matrix has less.
        dtype: F32, F16 or BF16.

    Raises:
        ExportError: a factor is beyond the dtype's range.
    """
    update = delta.update(name).astype(np.float64)
    B, A = truncated(update, rank)
    B_bits, B_found = _rounded(B, dtype, name)
    A_bits, A_found = _rounded(A, dtype, name)
    norm = float(np.linalg.norm(update))
    # In place: the update is as large as the weight, and this runs in several threads.
    update -= B_found @ A_found
    return FactorPair(B=B_bits, A=A_bits, error=float(np.linalg.norm(update)), norm=norm)


def factor_pairs(
    delta: Delta, dtype: str, svd: int | None, *, threads: int | None, progress: Progress
) -> dict[str, FactorPair]:
    """Compute the factors of every target, in parallel.

    Args:
        delta: bound to its base.
        dtype: F32, F16 or BF16.
        svd: truncate every update to this rank; None for exact factors.
        threads: cores to use; None for all.
        progress: called with how many targets are done.

    Raises:
        ExportError: a factor is beyond the dtype's range.
    """
    names = list(delta.targets)
    make = (
        partial(exact_pair, dtype=dtype)
        if svd is None
        else partial(svd_pair, rank=svd, dtype=dtype)
    )
    meter = Meter("factors", len(names), "tensors", progress)

    def one(name: str) -> FactorPair:
        pair = make(delta, name)
        meter.add(1)
        return pair

    pairs = parallel.run(
        one, names, meter, weight=lambda name: delta.target(name).stored[1], threads=threads
    )
    return dict(zip(names, pairs, strict=True))


def relative_error(pairs: Iterable[FactorPair]) -> float:
    """Return the Frobenius norm of all that was lost, over that of all updates; 0 for none."""
    kept = list(pairs)
    norm = float(np.sqrt(sum(pair.norm**2 for pair in kept)))
    return float(np.sqrt(sum(pair.error**2 for pair in kept))) / norm if norm else 0.0


def top_rank(pairs: Mapping[str, FactorPair]) -> int:
    """Return the highest rank of any target, at least 1."""
    return max(1, *(pair.rank for pair in pairs.values()))


def padded(pair: FactorPair, rank: int) -> FactorPair:
    """Add components of zero up to a rank; the update stays the same."""
    more = rank - pair.rank
    B = np.pad(pair.B, ((0, 0), (0, more)))
    A = np.pad(pair.A, ((0, more), (0, 0)))
    return FactorPair(B=B, A=A, error=pair.error, norm=pair.norm)


def require_low_rank(delta: Delta) -> None:
    """Refuse what is not smaller as two factors than as a matrix.

    Raises:
        ExportError: the method is of full rank, or its rank is too high for the targets.
    """
    method = delta.form
    if method.full_rank:
        raise ExportError(
            f"a {method.name} update has full rank, so no LoRA adapter of a useful rank equals it",
            fix="--svd RANK keeps the largest part of it and says how much is lost; or merge",
        )
    shapes = [target.matrix for target in delta.targets.values()]
    factors = sum(method.rank * (out + in_) for out, in_ in shapes)
    dense = sum(out * in_ for out, in_ in shapes)
    if factors > dense:
        raise ExportError(
            f"rank {method.rank} is not low for these targets: the adapter's factors would have"
            f" {factors} entries, the weights have {dense}",
            fix="--svd RANK with a smaller rank, which says how much is lost; or merge",
        )


def _rounded(values: Matrix, dtype: str, name: str) -> tuple[Matrix, Matrix]:
    """Round to a dtype, to nearest even; return its bits, and what they stand for in float64.

    Raises:
        ExportError: a factor is beyond the dtype's range.
    """
    with np.errstate(over="ignore"):
        bits = FLOATS[dtype].narrow(values)
    wide = FLOATS[dtype].widen(bits).reshape(values.shape).astype(np.float64)
    if not np.isfinite(wide).all():
        raise ExportError(
            f"the update of {name} is too large for {dtype}",
            fix="choose a wider --dtype where the command has one, or kilodelta merge",
        )
    return bits, wide
