"""A target's update as the two float factors of a LoRA adapter, scale folded in, error measured.

The factors of every low-rank method are integers, so the float ones are exact but for one rounding
each: to the adapter's dtype. Between the two, each rank's scale is split by a power of two, so that
both have entries of like size and float16 neither overflows nor underflows sooner than it must.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ldexp
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from kilodelta.errors import ExportError
from kilodelta.export.peft_svd import truncated
from kilodelta.format import exact
from kilodelta.format.delta import Delta
from kilodelta.format.lowrank import product_error, product_norm
from kilodelta.format.methods import RandLora

Matrix = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Pair:
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
    """float64 B and A of a low-rank update, without components that are zero."""
    factors = delta.factors(name)
    left, right = factors.left.astype(np.float64), factors.right.astype(np.float64)
    tops = np.abs(left).max(axis=0), np.abs(right).max(axis=1)
    used = (tops[0] > 0) & (tops[1] > 0)
    left, right = left[:, used] * factors.c, right[used]
    share = np.log2(tops[1][used]) - np.log2(tops[0][used] * factors.c)
    shift = np.rint((factors.e + share) / 2).astype(np.int64)
    return np.ldexp(left, shift), np.ldexp(right, (factors.e - shift)[:, None])


def exact_pair(delta: Delta, name: str, dtype: str) -> Pair:
    """The update of a low-rank method, exact but for the rounding to `dtype`."""
    B, A = float_factors(delta, name)
    B_bits, A_bits = ROUND[dtype](B), ROUND[dtype](A)
    error = product_error((WIDEN[dtype](B_bits), WIDEN[dtype](A_bits)), (B, A))
    return Pair(B=B_bits, A=A_bits, error=error, norm=product_norm(B, A))


def svd_pair(delta: Delta, name: str, rank: int, dtype: str) -> Pair:
    """The nearest update of a rank, of any method."""
    factors = delta.factors(name)
    bound = delta.method.bound(delta.coefficients(name))
    update = exact.product(factors.left, factors.right, bound).astype(np.float64)
    update *= ldexp(float(factors.c), factors.e)
    B, A = truncated(update, rank)
    B_bits, A_bits = ROUND[dtype](B), ROUND[dtype](A)
    norm = float(np.linalg.norm(update))
    update -= WIDEN[dtype](B_bits) @ WIDEN[dtype](A_bits)
    return Pair(B=B_bits, A=A_bits, error=float(np.linalg.norm(update)), norm=norm)


def padded(pair: Pair, rank: int) -> Pair:
    """The same update with zero components up to a rank."""
    more = rank - pair.rank
    B = np.pad(pair.B, ((0, 0), (0, more)))
    A = np.pad(pair.A, ((0, more), (0, 0)))
    return Pair(B=B, A=A, error=pair.error, norm=pair.norm)


def require_low_rank(delta: Delta) -> None:
    """Refuse what is not smaller as two factors than as a matrix.

    Raises:
        ExportError: the method is of full rank, or its rank is too high for the targets.
    """
    method = delta.method
    if isinstance(method, RandLora):
        raise ExportError(
            "a randlora update has full rank, so no LoRA adapter of a useful rank equals it",
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


def _to_bfloat16(values: Matrix) -> Matrix:
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _from_bfloat16(bits: Matrix) -> Matrix:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


ROUND: Mapping[str, Callable[[Matrix], Matrix]] = MappingProxyType(
    {
        "F32": lambda values: values.astype(np.float32),
        "F16": lambda values: np.clip(values, -65504, 65504).astype(np.float16),
        "BF16": _to_bfloat16,
    }
)
"""float64 to the bits of a dtype, to nearest even; what float16 cannot reach shows as error."""

WIDEN: Mapping[str, Callable[[Matrix], Matrix]] = MappingProxyType(
    {
        "F32": lambda values: values.astype(np.float64),
        "F16": lambda values: values.astype(np.float64),
        "BF16": _from_bfloat16,
    }
)
"""The bits of a dtype to float64, exactly."""
