"""Products of integers in floats, a row or two at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kilodelta.exact import fused


@pytest.mark.parametrize("inner", [1, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_two_rows_of_a_product_at_once(inner: int, dtype: type) -> None:
    rng = np.random.default_rng(inner)
    left: Any = rng.integers(-9, 10, (2, inner)).astype(dtype)
    right: Any = rng.integers(-9, 10, (inner, 150)).astype(dtype)
    acc: Any = np.full((2, 101), np.nan, dtype)
    fused.multiply_two_rows(left, right, 7, acc)
    assert np.array_equal(acc, (left @ right)[:, 7:108])
