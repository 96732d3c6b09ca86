"""Truncated SVDs, held against LAPACK's whole ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kilodelta.merging.low_rank import truncated

SHAPES = [(420, 300), (300, 420), (90, 40), (40, 90)]


def _with_values(shape: tuple[int, int], values: Any) -> Any:
    """A matrix of these singular values, between random directions."""
    rng = np.random.default_rng(5)
    left, right = (np.linalg.qr(rng.normal(size=(side, len(values))))[0] for side in shape)
    return left * values @ right.T


def _best(matrix: Any, rank: int) -> Any:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vt[:rank]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_the_product_is_the_best_of_its_rank(shape: tuple[int, int], rank: int) -> None:
    """Values as those of a fine-tune's change fall: 1, 0.87, 0.6, 0.55, 0.44, ..."""
    matrix = _with_values(shape, 1e-3 / np.arange(1, min(shape) + 1) ** 0.5)
    left, right = truncated(matrix.astype(np.float32), rank)
    assert (left.shape, right.shape) == ((shape[0], rank), (rank, shape[1]))
    best = _best(matrix, rank)
    # float32's rounding of the entries, over the gap between the last value kept and the next.
    gap = 1 - ((rank) / (rank + 1)) ** 0.5
    assert np.linalg.norm(left @ right - best) < 1e-6 / gap * np.linalg.norm(best)
    assert np.linalg.norm(left, axis=0) == pytest.approx(np.linalg.norm(right, axis=1))


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_values_lose_no_more_than_the_best(shape: tuple[int, int]) -> None:
    """Any four of six equal directions are as good as any others."""
    matrix = _with_values(shape, np.array([2.0] * 6 + [1.0] * 10))
    left, right = truncated(matrix, 4)
    assert np.linalg.norm(matrix - left @ right) == pytest.approx((2 * 4 + 10) ** 0.5)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_matrix_of_lower_rank_is_kept_whole(rank: int) -> None:
    matrix = _with_values((400, 300), np.arange(1.0, rank + 1))
    left, right = truncated(matrix, 8)
    assert np.abs(matrix - left @ right).max() < 1e-13


@pytest.mark.parametrize("shape", [(500, 400), (400, 500)])
def test_values_that_hardly_fall(shape: tuple[int, int]) -> None:
    """Random entries are the hardest case."""
    matrix = np.random.default_rng(1).normal(size=shape)
    left, right = truncated(matrix, 3)
    lost = np.linalg.norm(matrix - left @ right)
    assert lost == pytest.approx(np.linalg.norm(matrix - _best(matrix, 3)), rel=1e-9)


def test_whole_decompositions_are_for_small_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the method is for: LAPACK sees the thin matrices alone."""
    seen = []
    whole = np.linalg.svd

    def watched(matrix: Any, **given: Any) -> Any:
        seen.append(min(matrix.shape))
        return whole(matrix, **given)

    monkeypatch.setattr(np.linalg, "svd", watched)
    truncated(_with_values((576, 1536), 1 / np.arange(1.0, 577)), 4)
    assert max(seen) < 576 / 4


@pytest.mark.parametrize("size", [300, 900])
def test_what_is_not_finite_is_an_error(size: int) -> None:
    matrix = np.ones((size, size))
    matrix[7, 7] = np.nan
    with pytest.raises(np.linalg.LinAlgError):
        truncated(matrix, 2)


@pytest.mark.parametrize("shape", [(850, 1000), (1000, 850)])
def test_large_matrices_are_truncated_nearly_as_well_as_can_be(shape: tuple[int, int]) -> None:
    """Random values are the hardest case: singular values that hardly fall."""
    rng = np.random.default_rng(3)
    matrix = rng.normal(size=shape)
    matrix[:, :7] *= 20
    left, right = truncated(matrix, 12)
    squares = np.square(np.linalg.svd(matrix, compute_uv=False))
    kept = squares.sum() - np.square(matrix - left @ right).sum()
    assert left.shape == (shape[0], 12)
    assert 0.9999 < kept / squares[:12].sum() <= 1 + 1e-12
