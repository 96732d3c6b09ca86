"""Inputs reach an artefact with the values they had, or are refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kilodelta.errors import InputError
from kilodelta.verify.runners.runner import converted


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1, 2], "int64"),
        ([1.0, 2.0, -3.0], "int64"),
        ([2.0**53], "int64"),
        (np.array([5], "int32"), "int64"),
        (np.array([5], ">i8"), "int64"),
        ([True, False], "int64"),
        ([1, 0], "bool"),
        ([0, 255], "uint8"),
        ([0.5, np.inf, -np.inf], "float32"),
        ([3, 4], "float32"),
        ([np.float16(0.1)], "float32"),
        (np.zeros((0, 4)), "int64"),
        (7, "int64"),
    ],
)
def test_values_that_fit_are_kept(values: Any, dtype: str) -> None:
    given = np.asarray(values)
    result = converted("ids", given, dtype)
    assert result.dtype == np.dtype(dtype)
    assert result.shape == given.shape
    assert result.flags.c_contiguous
    assert np.array_equal(result, given)


def test_floats_are_rounded_to_the_artefacts_precision() -> None:
    assert converted("x", np.array([0.1]), np.float32)[0] == np.float32(0.1)
    assert np.isnan(converted("x", np.array([np.nan]), np.float16)[0])


@pytest.mark.parametrize(
    ("values", "dtype", "said"),
    [
        ([1.0, 1.7], "int64", "input ids holds 1.7 as float64; the model takes int64"),
        ([-0.5], "int32", "holds -0.5"),
        ([np.nan], "int64", "holds nan"),
        ([np.inf], "int64", "holds inf"),
        ([1e30], "int64", "1e+30"),
        ([2.0**63], "int64", "9.22"),
        ([1 << 40], "int32", "1099511627776 as int64; the model takes int32"),
        ([300], "uint8", "holds 300"),
        ([-1], "uint8", "holds -1"),
        ([2], "bool", "holds 2"),
        ([0.5], "bool", "holds 0.5"),
        ([70000.0], "float16", "70000.0 as float64; the model takes float16"),
        ([1e300], "float32", "1e+300"),
        (["how"], "int64", "holds <U3, not numbers"),
        ([1 + 2j], "float32", "holds complex128, not numbers"),
        ([None], "int64", "holds object, not numbers"),
        (np.array(["2026-01-01"], "datetime64[D]"), "int64", "not numbers"),
    ],
)
def test_values_that_would_become_others_are_refused(values: Any, dtype: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        converted("ids", np.asarray(values), dtype)
    assert said in caught.value.what
