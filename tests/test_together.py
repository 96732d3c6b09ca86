"""Factors of many targets at once are the factors of each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from making import METHODS, delta, folder, ids, model

from kilodelta.export.peft_factors import balanced, balanced_alike
from kilodelta.format import together
from kilodelta.format.methods import Method, Nola

SEVERAL = (*METHODS, Nola(rank=1, bases=1), Nola(rank=5, bases=300))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", SEVERAL, ids=ids)
def test_at_once_or_one_by_one_is_the_same(method: Method, bits: int, tmp_path: Path) -> None:
    """The targets have sides of 9, 10, 12, 20, 21 and 30: alone and in groups."""
    base = folder(tmp_path / "base", model())
    made = delta(base, method, bits=bits).bind(base)
    names = list(made.targets)[::-1]
    found = together.factors(made, names, threads=2)
    assert list(found) == names
    for name in names:
        alone = made.factors(name)
        assert np.array_equal(found[name].left, alone.left), name
        assert np.array_equal(found[name].right, alone.right), name
        assert (found[name].c, found[name].e) == (alone.c, alone.e)


@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_factors_of_like_size_at_once_or_one_by_one(method: Method, tmp_path: Path) -> None:
    if method.name == "randlora":
        pytest.skip("its factors are not low-rank")
    base = folder(tmp_path / "base", model())
    made = delta(base, method, bits=8).bind(base)
    for name in made.targets:
        factors = made.factors(name)
        empty = replace(factors, left=0 * factors.left)
        B, A = balanced(factors)
        many_B, many_A = balanced_alike([factors, empty, factors])
        used = many_B[0].any(axis=0) & many_A[0].any(axis=1)
        assert used.sum() == A.shape[0]
        assert np.array_equal(many_B[0][:, used], B)
        assert np.array_equal(many_A[2][used], A)
        assert not many_B[1].any()
        assert np.isfinite(many_A[1]).all()
