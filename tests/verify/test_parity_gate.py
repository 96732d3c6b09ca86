"""The gate: four times torch's largest error, never less than four roundings."""

from __future__ import annotations

import numpy as np
import pytest

from kilodelta.verify.parity.gate import MOST, carries, limit
from kilodelta.verify.parity.metrics import Metrics, compare


def off_by(relative: float) -> Metrics:
    """An output (1, 0) whose relative L2 and relative maximum both are `relative`."""
    return compare(np.array([1.0, relative]), np.array([1.0, 0.0]))


def test_four_times_the_largest_of_the_cases() -> None:
    most = limit([off_by(1e-4), off_by(1e-3), off_by(0.0)], "float32")
    assert most.relative_l2 == most.relative_max == pytest.approx(4e-3, rel=1e-12)


@pytest.mark.parametrize(
    ("precision", "floor"),
    [("float64", 2**-51), ("float32", 2**-22), ("float16", 2**-9), ("bfloat16", 2**-6)],
)
def test_never_less_than_four_roundings(precision: str, floor: float) -> None:
    most = limit([off_by(0.0)], precision)
    assert (most.relative_l2, most.relative_max) == (floor, floor)
    assert most.admits(off_by(floor))
    assert not most.admits(off_by(1.01 * floor))


def test_an_overflow_in_torch_excuses_nothing() -> None:
    most = limit([off_by(np.inf), off_by(1e-3)], "float16")
    assert most.relative_l2 == pytest.approx(4e-3, rel=1e-12)
    assert limit([off_by(np.inf)], "float16").relative_l2 == 2**-9
    assert not most.admits(off_by(np.inf))


@pytest.mark.parametrize("error", [0.03, 0.96, 50.0])
def test_no_error_of_torch_excuses_more_than_a_tenth(error: float) -> None:
    """Four times torch's error admits anything once torch itself is lost."""
    most = limit([off_by(error)], "float16")
    assert (most.relative_l2, most.relative_max) == (MOST, MOST) == (0.1, 0.1)
    assert not most.admits(off_by(0.5))


def test_a_precision_carries_a_model_up_to_the_same_tenth() -> None:
    assert carries([off_by(0.03), off_by(0.09)])
    assert not carries([off_by(0.03), off_by(0.96)])
    assert not carries([off_by(np.inf)])


def test_both_errors_have_to_be_small() -> None:
    """One wrong element of a thousand hides in the norm, a small shift of all in the maximum."""
    reference = np.linspace(0.1, 1.0, 1000)
    spike, shift = reference.copy(), reference + 0.003
    spike[0] += 0.03
    most = limit([off_by(1e-3)], "float32")
    single, spread = compare(spike, reference), compare(shift, reference)
    assert single.relative_l2 < most.relative_l2 < single.relative_max
    assert spread.relative_max < most.relative_max < spread.relative_l2
    assert not most.admits(single)
    assert not most.admits(spread)
