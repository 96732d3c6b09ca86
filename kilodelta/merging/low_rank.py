"""Find the nearest matrix of low rank: the truncated SVD, without the parts that it cuts off.

Source: small matrices by LAPACK, others by a block Krylov method with a random start (Musco and
Musco, https://arxiv.org/abs/1504.05477), which goes on until each singular pair is one to within
`TOLERANCE`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[Any]

SMALL = 128
"""Shorter sides up to here are decomposed whole, which is faster."""
WHOLE = 768
"""Shorter sides up to here are decomposed whole where the Krylov method does not converge."""
SPARE = 8
"""Columns drawn beyond the rank."""
STEPS = 6
"""Products with the matrix and its transpose between two looks at what is reached."""
LOOKS = 4
"""Looks after which the method ends; beyond `WHOLE`, with what it has."""
TOLERANCE = 1e-9
"""The largest |M^T M v - s^2 v| over s_1^2 of a pair (s, v) that counts as one; it bounds the
relative error of a squared singular value, far below what float32 resolves."""


def truncated(matrix: Matrix, rank: int) -> tuple[Matrix, Matrix]:
    """Compute left (D, r) and right (r, d), float64, whose product is the best of that rank.

    Each singular value is shared evenly by the two. Of matrices whose shorter side is larger than
    `WHOLE` and whose singular values hardly fall, the product is nearly the best.

    Args:
        matrix: floats (D, d), all finite.
        rank: of the product, or less where the matrix has less.

    Example:
        >>> left, right = truncated(np.array([[0.0, 4.0], [1.0, 0.0]]), rank=1)
        >>> (left @ right).round(9).tolist()
        [[0.0, 4.0], [0.0, 0.0]]
    """
    matrix = matrix.astype(np.float64, copy=False)
    rank = min(rank, *matrix.shape)
    u, s, vt = _krylov(matrix, rank) or np.linalg.svd(matrix, full_matrices=False)
    root = np.sqrt(s[:rank])
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def _krylov(matrix: Matrix, rank: int) -> tuple[Matrix, Matrix, Matrix] | None:
    """Return the leading singular triplets; None where the whole decomposition is better."""
    shorter, width = min(matrix.shape), rank + SPARE
    if shorter <= SMALL:
        return None
    if matrix.shape[0] < matrix.shape[1]:  # the space is spanned in the shorter side's dimension
        turned = _krylov(matrix.T, rank)
        return None if turned is None else (turned[2].T, turned[1], turned[0].T)
    # A fixed seed: the same matrix gives the same factors.
    block = _orthonormal(np.random.default_rng(0).standard_normal((shorter, width)))
    space, found, error = block, None, np.inf
    for _ in range(LOOKS):
        if space.shape[1] + STEPS * width > shorter:
            break
        for _ in range(STEPS):
            # Orthonormal at each step, or all columns would turn into the first singular vector;
            # twice, for of a matrix of low rank nothing but rounding is left the first time.
            block = matrix.T @ (matrix @ block)
            for _ in range(2):
                block = _orthonormal(block - space @ (space.T @ block))
            space = np.concatenate([space, block], axis=1)
        found, error = _singular(matrix, space, rank)
        if error <= TOLERANCE:
            return found
    # Of what is not finite LAPACK says so.
    return found if shorter > WHOLE and np.isfinite(error) else None


def _singular(
    matrix: Matrix, space: Matrix, rank: int
) -> tuple[tuple[Matrix, Matrix, Matrix], float]:
    """Compute the best singular triplets with right vectors in a space, and how far off they are.

    Returns:
        The triplets, and the largest |M^T M v - s^2 v| over the largest s^2.
    """
    u, s, vt = np.linalg.svd(matrix @ space, full_matrices=False)
    u, s, v = u[:, :rank], s[:rank], space @ vt[:rank].T
    missed = matrix.T @ (u * s) - v * np.square(s)
    largest = max(float(s[0]) ** 2, np.finfo(np.float64).tiny)
    return (u, s, v.T), float(np.linalg.norm(missed, axis=0).max()) / largest


def _orthonormal(columns: Matrix) -> Matrix:
    basis: Matrix = np.linalg.qr(columns)[0]
    return basis
