"""Factors of many targets at once are the factors of each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kilodelta.export.peft.factors import scales
from kilodelta.format.methods import Method, Nola
from kilodelta.merging import stacks
from tests.support.making import METHODS, delta, folder, ids, model

SEVERAL = (*METHODS, Nola(rank=1, bases=1), Nola(rank=5, bases=300))


@pytest.mark.parametrize("threads", [None, 2])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", SEVERAL, ids=ids)
def test_at_once_or_one_by_one_is_the_same(
    method: Method, bits: int, threads: int | None, tmp_path: Path
) -> None:
    """The targets have sides of 9, 10, 12, 20, 21 and 30: alone and in groups."""
    base = folder(tmp_path / "base", model())
    made = delta(base, method, bits=bits).bind(base)
    names = list(made.targets)[::-1]
    found = stacks.stacks(made, names, threads=threads)
    for is_left in (True, False):
        sides = {
            name: values
            for stack in found
            if stack.is_left == is_left
            for name, values in zip(stack.names, stack.values, strict=True)
        }
        assert set(sides) == set(names)
        for name in names:
            alone = made.factors(name)
            assert np.array_equal(sides[name], alone.left if is_left else alone.right), name


def test_nolas_targets_of_one_length_are_mixed_at_once(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", {f"{n}.weight": ("F32", (8, 6), b"\0" * 192) for n in "abc"})
    made = delta(base, Nola(rank=3, bases=130)).bind(base)
    shapes = [stack.values.shape for stack in stacks.stacks(made, list(made.targets))]
    assert shapes == [(3, 8, 3), (3, 3, 6)]


def test_scales_give_both_factors_entries_of_like_size() -> None:
    """Tops 3 * 40 and 7 with 2^-10: shift = round((-10 + log2 7 - log2 120) / 2) = -7."""
    left, right = scales(np.array([40, 0, 5]), np.array([7, 9, 0]), 3.0, -10)
    assert left.tolist() == [3 * 2.0**-7, 0.0, 0.0]
    assert right.tolist() == [2.0**-3, 0.0, 0.0]
