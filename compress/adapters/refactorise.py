"""Write a product in other factors, choosing those that lose least when they are quantised.

B A = (B R) (R^-1 A) for every invertible R. A group of coefficients has one scale, so what is lost
depends on R; a handful is tried, and the loss of each is measured, not guessed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kilodelta.format.methods import Lora
from kilodelta.format.quantise import Floats, Quantised
from kilodelta.merging.build import quantise_target
from kilodelta.merging.thin_factors import product_error, product_norm

Pair = tuple[Floats, Floats]
"""B (out, r) and A (r, in), float64."""


@dataclass(frozen=True, kw_only=True)
class Best:
    """The quantised groups of the best factors, and the Frobenius norms of loss and update."""

    groups: dict[str, Quantised]
    error: float
    norm: float


def quantise_product(pair: Pair, rank: int, bits: int) -> Best:
    """Quantise a product B A into a method of so high a rank, losing little.

    Raises:
        InputError: the update cannot be exact.
    """
    method = Lora(rank=rank)
    tries = [_tried(method, _padded(candidate, rank), bits) for candidate in candidates(pair)]
    return min(tries, key=lambda best: best.error)


def candidates(pair: Pair) -> Iterator[Pair]:
    """Yield the factors unchanged, balanced by rank, by singular values, and in mixed directions.

    Mixing flattens what heavy tails would waste a scale on.
    """
    B, A = pair
    tops = _nonzero(np.abs(B).max(axis=0)), _nonzero(np.abs(A).max(axis=1))
    yield B, A
    yield B / tops[0], A * tops[0][:, None]
    by = np.sqrt(tops[1] / tops[0])
    yield B * by, A / by[:, None]
    left, right = by_singular_values(B, A)
    yield left, right
    size = right.shape[0]
    mixing = np.linalg.qr(np.random.default_rng(0).standard_normal((size, size)))[0]
    yield left @ mixing, mixing.T @ right


def by_singular_values(B: Floats, A: Floats) -> Pair:
    """Factorise the same product in its singular directions, each value shared evenly.

    The rank is at most the shorter side's. QR of both factors first, so that no matrix is larger
    than the thin factors.
    """
    Q, R = np.linalg.qr(B)
    P, S = np.linalg.qr(A.T)
    U, s, Vt = np.linalg.svd(R @ S.T, full_matrices=False)
    root = np.sqrt(s)
    return (Q @ U) * root, root[:, None] * (Vt @ P.T)


def _nonzero(values: Floats) -> Floats:
    filled: Floats = np.where(values > 0, values, 1.0)
    return filled


def _padded(pair: Pair, rank: int) -> Pair:
    B, A = pair
    more = rank - A.shape[0]
    return np.pad(B, ((0, 0), (0, more))), np.pad(A, ((0, more), (0, 0)))


def _tried(method: Lora, pair: Pair, bits: int) -> Best:
    B, A = pair
    groups = quantise_target(method, {"A": A, "B": B}, bits)
    error = product_error((groups["B"].value, groups["A"].value), pair)
    return Best(groups=groups, error=error, norm=product_norm(B, A))
