"""Matrices that are given as two thin factors."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[Any]


def product_norm(left: Matrix, right: Matrix) -> float:
    """The Frobenius norm of left @ right, float64, without making the product."""
    return float(np.sqrt(max(0.0, float(np.sum((left.T @ left) * (right @ right.T))))))


def product_error(found: tuple[Matrix, Matrix], wanted: tuple[Matrix, Matrix]) -> float:
    """The Frobenius norm of the difference of two products whose factors are close.

    Differences of factors are taken first, so that nothing cancels.
    """
    left, right = found
    return product_norm(
        np.hstack([left - wanted[0], wanted[0]]), np.vstack([right, right - wanted[1]])
    )
