"""Measure matrices that are given as two thin factors."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[Any]


def product_norm(left: Matrix, right: Matrix) -> float:
    """Compute the Frobenius norm of left @ right without making the product.

    Args:
        left: float64 (out, K).
        right: float64 (K, in).

    Example:
        >>> product_norm(np.array([[3.0], [4.0]]), np.array([[2.0]]))
        10.0
    """
    # |L R|^2 = trace(R^T L^T L R), the sum over (L^T L) * (R R^T): two small (K, K) matrices.
    # Rounding may leave it just below zero where the product vanishes.
    return float(np.sqrt(max(0.0, float(np.sum((left.T @ left) * (right @ right.T))))))


def product_error(actual: tuple[Matrix, Matrix], wanted: tuple[Matrix, Matrix]) -> float:
    """Compute the Frobenius norm of the difference of two products whose factors are close.

    Differences of factors are taken first, so that nothing cancels.

    Args:
        actual, wanted: (left, right) of each product.
    """
    left, right = actual
    return product_norm(
        np.hstack([left - wanted[0], wanted[0]]), np.vstack([right, right - wanted[1]])
    )
