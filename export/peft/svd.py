"""Find the nearest update of low rank, for deltas that have none.

Source: small matrices by LAPACK, large ones by a randomised block Krylov method, near-optimal even
where singular values fall slowly (Musco and Musco, https://arxiv.org/abs/1504.05477).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[Any]

SMALL = 768
"""Shorter sides up to here take the exact decomposition."""
STEPS = 6
"""Products with the matrix and its transpose that span the Krylov space."""
SPARE = 8
"""Columns drawn beyond the rank."""


def truncated(matrix: Matrix, rank: int) -> tuple[Matrix, Matrix]:
    """Compute left (D, r) and right (r, d), float64, whose product is nearly the best of that rank.

    Each singular value is shared evenly by the two.

    Args:
        matrix: float64 (D, d).
        rank: of the product, or less where the matrix has less.
    """
    rank = min(rank, *matrix.shape)
    whole = min(matrix.shape) <= max(SMALL, (STEPS + 1) * (rank + SPARE))
    u, s, vt = np.linalg.svd(matrix, full_matrices=False) if whole else _krylov(matrix, rank)
    root = np.sqrt(s[:rank])
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def _krylov(matrix: Matrix, rank: int) -> tuple[Matrix, Matrix, Matrix]:
    # A fixed seed: the same delta gives the same adapter.
    start = np.random.default_rng(0).standard_normal((matrix.shape[1], rank + SPARE))
    block, blocks = _orthonormal(matrix @ start), []
    for _ in range(STEPS):
        blocks.append(block)
        # Orthonormal at each step, or all columns would turn into the first singular vector.
        block = _orthonormal(matrix @ (matrix.T @ block))
    space = _orthonormal(np.concatenate([*blocks, block], axis=1))
    u, s, vt = np.linalg.svd(space.T @ matrix, full_matrices=False)
    return space @ u, s, vt


def _orthonormal(columns: Matrix) -> Matrix:
    basis: Matrix = np.linalg.qr(columns)[0]
    return basis
