"""Factors of many targets at once are the factors of each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from making import METHODS, delta, folder, ids, model

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
    found = together.factors(made, names)
    assert list(found) == names
    for name in names:
        alone = made.factors(name)
        assert np.array_equal(found[name].left, alone.left), name
        assert np.array_equal(found[name].right, alone.right), name
        assert (found[name].c, found[name].e) == (alone.c, alone.e)
