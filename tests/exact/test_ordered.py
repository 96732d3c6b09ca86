"""The ordered sum of the compatibility forms, against plain loops."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from kilodelta.exact import ordered
from kilodelta.exact.selftest import ORDERED_DIGEST


def by_loops(left: Any, right: Any) -> Any:
    """Python floats, the inner index ascending."""
    rows, columns = left.tolist(), right.T.tolist()
    found = []
    for row in rows:
        for column in columns:
            total = 0.0
            for a, b in zip(row, column, strict=True):
                total += a * b
            found.append(total)
    return np.array(found).reshape(len(rows), len(columns))


def test_the_self_tests_digest_is_that_of_plain_loops() -> None:
    left = (((np.arange(3 * 150) * 37) % 255 - 127) / 7).astype(np.float32).reshape(3, 150)
    right = (((np.arange(150 * 270) * 91) % 1021 - 510) / 11).astype(np.float32).reshape(150, 270)
    found = by_loops(left, right)
    assert hashlib.sha256(found.astype("<f8").tobytes()).hexdigest() == ORDERED_DIGEST
    backwards = by_loops(left[:, ::-1], right[::-1])
    assert not np.array_equal(backwards, found)  # the order shows


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (3, 131, 7), (2, 257, 300)])
def test_sizes_that_do_not_divide(shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    rng = np.random.default_rng(sum(shape))
    left = (rng.normal(size=(rows, inner)) * 10.0 ** rng.integers(-9, 9, (1, inner))).astype("f4")
    right = rng.normal(size=(inner, columns)).astype("f4")
    assert np.array_equal(ordered.multiplier(right)(left), by_loops(left, right))
