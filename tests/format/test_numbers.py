"""Coefficients, scales, and the one rounding of the format, value by value."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kilodelta.errors import FileError, InputError
from kilodelta.exact import reference, rounding
from kilodelta.format.packing import largest, pack, packed_size, unpack
from kilodelta.format.quantise import Scale, quantise, scale_above, scale_near


def test_packing_typed_in() -> None:
    assert pack(np.array([1, -1, 7]), 4).tolist() == [0xF1, 0x07]
    assert pack(np.array([1, -1, -127]), 8).tolist() == [0x01, 0xFF, 0x81]
    assert pack(np.array([1, -2, 258]), 16).tolist() == [0x01, 0, 0xFE, 0xFF, 0x02, 0x01]
    assert unpack(np.array([0xF1, 0x07], np.uint8), 3, 4).tolist() == [1, -1, 7]


@given(st.sampled_from([4, 8, 16]), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_packing_there_and_back(bits: int, count: int, seed: int) -> None:
    q = np.random.default_rng(seed).integers(-largest(bits), largest(bits) + 1, count)
    data = pack(q, bits)
    assert data.size == packed_size(count, bits)
    assert unpack(data, count, bits).tolist() == q.tolist()


@pytest.mark.parametrize(("bits", "data"), [(4, [0x08]), (8, [0x80]), (16, [0x00, 0x80])])
def test_the_most_negative_value_is_refused(bits: int, data: list[int]) -> None:
    with pytest.raises(FileError, match=f"outside the symmetric {bits}-bit range"):
        unpack(np.array(data, np.uint8), 1, bits)
    with pytest.raises(InputError, match="do not fit"):
        pack(np.array([-largest(bits) - 1]), bits)


def test_a_filled_unused_half_byte_is_refused() -> None:
    with pytest.raises(FileError, match="unused half"):
        unpack(np.array([0x11], np.uint8), 1, 4)


@given(st.floats(1e-30, 1e30), st.sampled_from([255, 127, 15, 1]))
def test_scales_are_the_smallest_above_and_the_nearest(step: float, c_max: int) -> None:
    scale = scale_above(step, c_max)
    assert 1 <= scale.c <= c_max
    assert step <= scale.value <= step * (1 + 2 / c_max)
    assert abs(scale_near(step, c_max).value - step) <= scale.value - step


def test_scales_at_the_edges() -> None:
    assert scale_above(0.0) == Scale(1, 0)
    with pytest.raises(InputError, match="not finite"):
        scale_above(float("nan"))
    with pytest.raises(InputError, match="no 8-bit exponent"):
        scale_above(1e300)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_rounding_to_integers_errs_by_half_a_step_or_clips(bits: int) -> None:
    values = np.random.default_rng(bits).normal(size=2000)
    found = quantise(values, bits)
    step, top = found.scale.value, largest(bits)
    inside = np.abs(values) <= top * step
    assert np.abs(found.value - values)[inside].max() <= step / 2 * (1 + 1e-12)
    assert np.abs(found.q).max() <= top
    # Four bits gain by clipping the tail; the others keep every value inside.
    assert inside.all() == (bits != 4)


def merged(dtype: str, bits: Any, numbers: Any, c: int, e: int) -> list[int]:
    view, add = rounding.ADD[dtype]
    weights = bits.astype(np.uint32 if dtype == "F32" else np.uint16).view(view)
    out = np.empty_like(weights)
    add(weights, numbers.astype(np.float64), np.float64(c), np.float32(2.0**e), out)
    return [int(x) for x in out.view(np.uint32 if dtype == "F32" else np.uint16)]


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize(
    ("dq", "c", "e"), [(0, 1, 0), (1, 1, -24), (-3, 7, -12), (12345, 201, -31)]
)
def test_all_finite_16_bit_weights(dtype: str, dq: int, c: int, e: int) -> None:
    bits = np.arange(65536)
    mask = 0x7C00 if dtype == "F16" else 0x7F80
    bits = bits[(bits & mask) != mask]
    found = merged(dtype, bits, np.full(bits.size, dq), c, e)
    with np.errstate(over="ignore"):
        expected = [reference.merge_element(dtype, int(b), c, e, dq) for b in bits[::7]]
    assert found[::7] == expected
    if dtype == "F16":
        step = np.float32(np.float32(c * dq) * np.float32(2.0**e))
        with np.errstate(over="ignore"):
            wide = bits.astype(np.uint16).view(np.float16).astype(np.float32) + step
            assert found == wide.astype(np.float16).view(np.uint16).tolist()


def test_float32_weights_ties_carries_subnormals() -> None:
    cases = [
        (0x3F800000, 1, -24, 0x3F800000),  # half an ulp above 1: to even, stays
        (0x3F800001, 1, -24, 0x3F800002),  # to even, goes up
        (0x3F7FFFFF, 1, -24, 0x3F800000),  # a carry into the exponent
        (0x00000001, 0, 0, 0x00000001),  # a subnormal is kept
        (0x80000000, 0, 0, 0x00000000),  # -0 + 0 = +0
        (0x00000000, 2**24 + 1, 0, 0x4B800000),  # N rounds to float32 first: to 2^24
        (0x00000000, 2**24 + 3, 0, 0x4B800002),  # and here up, to even
    ]
    for bits, dq, e, expected in cases:
        assert merged("F32", np.array([bits]), np.array([dq]), 1, e) == [expected], hex(bits)
        assert reference.merge_element("F32", bits, 1, e, dq) == expected


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_zero_with_a_minus_is_a_zero(dtype: str) -> None:
    minus = 0x80000000 if dtype == "F32" else 0x8000
    assert merged(dtype, np.array([minus]), np.array([-0.0]), 3, -4) == [0]


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_what_is_not_finite_is_reported(dtype: str) -> None:
    view, add = rounding.ADD[dtype]
    for value in (np.inf, -np.inf, np.nan):
        weights = np.array([1.0, value, 2.0], np.float32)
        raw: Any = weights.astype(np.float16).view(np.uint16) if dtype == "F16" else weights
        if dtype == "BF16":
            raw = (weights.view(np.uint32) >> 16).astype(np.uint16)
        out = np.empty(3, view)
        zeros = np.zeros(3)
        assert add(raw.view(view), zeros, np.float64(1), np.float32(1), out)
        assert not add(raw[::2].copy().view(view), zeros[:2], np.float64(1), np.float32(1), out[:2])
    big = np.array([np.float32(3.3e38)]).view(np.uint32)
    largest_weight: Any = {
        "F32": big,
        "BF16": (big >> 16).astype(np.uint16),
        "F16": np.array([0x7BFF], np.uint16),
    }[dtype]
    scale = np.float32(2.0**100 if dtype != "F16" else 1.0)
    numbers = np.array([2.0**27 if dtype != "F16" else 40.0])
    assert add(largest_weight.view(view), numbers, np.float64(1), scale, np.empty(1, view))
