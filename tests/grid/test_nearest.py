"""Rounding to a grid: the kernels against plain fractions, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from kilodelta.errors import CheckpointError
from kilodelta.exact import in_bytes, in_grid, nibbles, quotients
from kilodelta.grid.bits import pack_bits
from kilodelta.grid.codes import E2M1, E4M3, Kind, integer_kind
from kilodelta.grid.matrix import Matrix
from kilodelta.grid.reference import new_code
from kilodelta.grid.steps import float_grid, limits_of, steps_of

KINDS = (integer_kind(2), integer_kind(4), integer_kind(8), E2M1, E4M3)


def rounded(
    kind: Kind, codes: Any, zeros: Any, steps: Any, numbers: Any, c: int, e: int
) -> tuple[npt.NDArray[Any], int]:
    """What the kernel makes of codes, with a group of four columns per step."""
    matrix = Matrix(kind=kind, codes=codes, steps=steps, block=(1, 4), zeros=zeros)
    steps_, out, factor = steps_of(matrix, c, e), np.empty_like(codes), np.float64(c)
    if kind.is_float:
        found = in_grid.round_floats(numbers, factor, codes, 0, float_grid(kind), steps_, 1, out)
        require_bytes_alike(matrix, numbers, c, e, out, found[0])
        return out, found[0]
    limits = limits_of(matrix)
    found = in_grid.round_integers(numbers, factor, codes, 0, zeros, steps_, limits, 1, out)
    again = np.empty_like(out)  # with groups that are looked up column by column
    single = steps_._replace(width=0)
    other = in_grid.round_integers(numbers, factor, codes, 0, zeros, single, limits, 1, again)
    assert np.array_equal(out, again)
    assert found == other
    require_bytes_alike(matrix, numbers, c, e, out, found[0])
    return out, found[0]


def require_bytes_alike(
    matrix: Matrix, numbers: Any, c: int, e: int, wanted: Any, changed: int, first: int = 0
) -> None:
    """Merge the same in bytes of two codes, whose new bytes and codes must be `wanted`."""
    kind, codes = matrix.kind, matrix.codes
    if kind.bits != 4 or codes.shape[1] % 2:
        return
    offset, zeros = (0 if kind.is_float else 8), matrix.zeros
    zeros = np.zeros((0, 0), np.int16) if zeros is None else zeros
    stream = pack_bits(codes, 4, codes.shape[1] // 2, offset=offset)
    packed, found = np.empty_like(stream), np.empty(codes.shape, np.uint8)
    left, right = nibbles.halves(numbers), np.empty((0, codes.shape[1]), numbers.dtype)
    grid = float_grid(kind) if kind.is_float else zeros
    rest = (stream, first, grid, steps_of(matrix, c, e).of_bytes(), 1, packed, found)
    moved, _ = in_bytes.MERGE[kind.is_float](left, right, np.float64(c), *rest)
    assert np.array_equal(found.view(codes.dtype), wanted)
    assert np.array_equal(packed, pack_bits(wanted, 4, codes.shape[1] // 2, offset=offset))
    assert moved == changed


def by_fractions(
    kind: Kind, codes: Any, zeros: Any, steps: Any, numbers: Any, c: int, e: int
) -> npt.NDArray[Any]:
    found: npt.NDArray[Any] = np.empty_like(codes)
    for i, j in np.ndindex(codes.shape):
        zero = 0 if zeros is None else int(zeros[i, j // 4])
        update = int(numbers[i, j]) * c * Fraction(2) ** e
        found[i, j] = new_code(kind, int(codes[i, j]), zero, float(steps[i, j // 4]), update)
    return found


def drawn(kind: Kind, rng: np.random.Generator) -> tuple[npt.NDArray[Any], Any]:
    if kind.is_float:
        codes = rng.integers(0, 1 << kind.bits, (6, 12)).astype(np.uint8)
        codes[(codes & 0x7F) == 0x7F] = 0
        return codes, None
    codes = rng.integers(kind.low, kind.high + 1, (6, 12)).astype(np.int8)
    return codes, rng.integers(kind.low, kind.high + 1, (6, 3)).astype(np.int16)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.name))
@pytest.mark.parametrize("case", ["float16", "powers", "products", "ties"])
def test_kernels_equal_plain_fractions(kind: Kind, case: str) -> None:
    rng = np.random.default_rng(len(case) * 100 + kind.bits)
    for _ in range(6):
        codes, zeros = drawn(kind, rng)
        e, c = int(rng.integers(-40, 4)), int(rng.integers(1, 256))
        numbers = np.rint(rng.normal(size=(6, 12)) * 2.0**-e * rng.choice([0.01, 0.3, 3, 300]) / c)
        steps = rng.normal(size=(6, 3)).astype(np.float16).astype(float)
        if case == "powers":
            steps = np.sign(steps) * 2.0 ** rng.integers(-8, 3, (6, 3))
        elif case == "products":
            steps = rng.normal(size=(6, 3)).astype(np.float32) * rng.integers(1, 16, (6, 3)) * 1.0
        elif case == "ties":  # steps of zero as well
            steps, e, c = np.round(steps * 4) / 4, int(rng.integers(-8, 1)), 1
            numbers = rng.integers(-60, 60, (6, 12)).astype(np.int32)
        found, changed = rounded(kind, codes, zeros, steps, numbers, c, e)
        wanted = by_fractions(kind, codes, zeros, steps, numbers, c, e)
        assert np.array_equal(found, wanted)
        assert changed == int((kind.integers(found) != kind.integers(codes)).sum())


def test_ties_are_decided_where_floats_cannot() -> None:
    """N / M is a half, or a half and one part in 2^52: float64 sees no difference."""
    codes, zeros = np.zeros((1, 4), np.int8), np.zeros((1, 1), np.int16)
    step, half = np.array([[float(3 * 2**30 - 1)]]), (3 * 2**30 - 1) * 2**18
    # delta / step = N 2^-19 / M, so N = half is exactly 1/2
    numbers = np.array([[half, half + 1, half - 1, 3 * half]], np.float64)
    found, _ = rounded(integer_kind(4), codes, zeros, step, numbers, 1, -19)
    assert found.tolist() == [[0, 1, 0, 2]]
    wanted = by_fractions(integer_kind(4), codes, zeros, step, numbers, 1, -19)
    assert np.array_equal(found, wanted)


def middles_of(kind: Kind, codes: Any, zeros: Any, rng: np.random.Generator) -> Any:
    """Draw a midpoint of the grid for each code, as (midpoint - value) in units; clamped ones too.

    Exact: half units.
    """
    if kind.is_float:
        table, middles = float_grid(kind).table, float_grid(kind).middles
        drawn = rng.choice(middles, codes.shape) * rng.choice([-1, 1], codes.shape)
        return drawn / 2 - table[codes]
    targets = rng.integers(kind.low - 1, kind.high + 1, codes.shape)  # the code below it
    return targets + 0.5 - codes


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.name))
def test_weights_at_and_around_midpoints_are_decided_exactly(kind: Kind) -> None:
    """Updates that lead to a midpoint of the grid, or past it by one part in 2^10 to 2^50.

    Float32 sees no difference in most of them, float64 in many; so the rows' quotients must leave
    them in doubt. Bounds that are too narrow by any factor show here.
    """
    rng, undecided = np.random.default_rng(kind.bits), 0
    for trial in range(60):
        codes, zeros = drawn(kind, rng)
        if trial % 3 == 0 and zeros is not None:
            zeros = np.zeros_like(zeros)
        if trial % 5 == 0 and zeros is not None:
            zeros = zeros * 100  # beyond what float32 is used for
        e, c = int(rng.integers(-52, -10)), int(rng.choice([1, 1, 3, 60]))
        mantissas = rng.integers(1, 1 << int(rng.choice([3, 11, 24, 31])), (6, 3))
        # powers that let the midpoint be a number below 2^53 of the update's units
        power = int(rng.integers(e, 0)) - int(mantissas.max()).bit_length()
        steps = np.ldexp(mantissas.astype(float), power) * rng.choice([-1, 1], (6, 3))
        off = middles_of(kind, codes, zeros, rng) * 2  # in half units, exact
        numbers = np.empty(codes.shape)
        for i, j in np.ndindex(codes.shape):
            step = Fraction(float(steps[i, j // 4])) * Fraction(2) ** (kind.unit - 1)
            wanted = int(off[i, j]) * step / c / Fraction(2) ** e
            numbers[i, j] = (
                int(wanted) + int(rng.choice([-1, 0, 0, 1]))
                if trial % 2
                else round(
                    wanted
                    * (1 + Fraction(int(rng.integers(-3, 4)), 1 << int(rng.integers(10, 50))))
                )
            )
        numbers = np.clip(numbers, -(2**53 // c) + 1, 2**53 // c - 1)
        found, changed = rounded(kind, codes, zeros, steps, numbers, c, e)
        wanted_codes = by_fractions(kind, codes, zeros, steps, numbers, c, e)
        assert np.array_equal(found, wanted_codes), trial
        assert changed == int((kind.integers(found) != kind.integers(codes)).sum())
        undecided += doubtful(kind, codes, zeros, steps, numbers, c, e)
    assert undecided > 300, "too few weights came near a midpoint"


def doubtful(kind: Kind, codes: Any, zeros: Any, steps: Any, numbers: Any, c: int, e: int) -> int:
    """Count the weights of a matrix that the rows' quotients leave in doubt."""
    matrix = Matrix(kind=kind, codes=codes, steps=steps, block=(1, 4), zeros=zeros)
    values, groups, width, scale, _, _ = steps_of(matrix, c, e)
    limits = np.zeros(4, np.float32) if kind.is_float else limits_of(matrix)
    count = 0
    for i in range(len(codes)):
        room, out = (
            np.zeros((quotients.ROOM, codes.shape[1]), limits.dtype),
            np.empty_like(codes[i]),
        )
        quotients.fill_ratios(values, i, scale, groups, width, 0, room[0])
        if kind.is_float:
            table, highest, _, mantissa, sign = float_grid(kind)
            row = (numbers[i], codes[i], table, highest, mantissa, sign, room, out)
            count += quotients.float_tile(*row)[1]
        else:
            quotients.fill_zeros(zeros, i, groups, width, 0, room[1])
            count += quotients.integer_tile(numbers[i], codes[i], limits, room, out)[1]
    return int(count)


@pytest.mark.parametrize("kind", [E2M1, E4M3], ids=["e2m1", "e4m3"])
def test_float_grids_round_as_ml_dtypes_does(kind: Kind) -> None:
    """From a code of zero, a step of one and an update: the cast of the update, but for its end.

    ml_dtypes makes NaN of what lies beyond E4M3's range; a grid is clamped.
    """
    numbers = np.arange(-1100, 1101).reshape(1, -1).astype(np.float64)
    exponent = -6 if kind is E2M1 else -2
    codes = np.zeros(numbers.shape, np.uint8)
    steps = np.ones((1, -(-numbers.size // 4)))
    found, _ = rounded(kind, codes, None, steps, numbers, 1, exponent)
    limit = np.ldexp(float(kind.high), kind.unit)
    values = np.clip(np.ldexp(numbers, exponent), -limit, limit)
    narrow = ml_dtypes.float4_e2m1fn if kind is E2M1 else ml_dtypes.float8_e4m3fn
    library = values.astype(narrow).astype(np.float64)
    assert np.array_equal(np.ldexp(kind.integers(found).astype(float), kind.unit), library)
    assert not (found == 1 << (kind.bits - 1)).any()  # zero is +0


def test_minus_zero_becomes_zero_and_counts_as_no_change() -> None:
    codes = np.array([[8, 8, 9, 1]], np.uint8)
    numbers = np.array([[0, 0, 1, -1]], np.float64)
    found, changed = rounded(E2M1, codes, None, np.array([[2.0]]), numbers, 1, 0)
    assert (found.tolist(), changed) == ([[0, 0, 0, 0]], 2)
    still, changed = rounded(E2M1, codes, None, np.array([[-0.0]]), numbers, 1, 0)
    assert (still.tolist(), changed) == (codes.tolist(), 0)


@pytest.mark.parametrize("number", [2**52, -(2**52), 2**53 - 1])
@pytest.mark.parametrize("step", [2.0**-149 * 15, -65504.0, 3.0e38])
@pytest.mark.parametrize("e", [-126, 0, 73])
def test_no_size_overflows(number: int, step: float, e: int) -> None:
    for kind in KINDS:
        codes = np.zeros((1, 4), kind.dtype)
        zeros = None if kind.is_float else np.zeros((1, 1), np.int16)
        numbers = np.array([[number, 1, 0, -1]], np.float64)
        steps = np.array([[float(np.float32(step))]])
        found, _ = rounded(kind, codes, zeros, steps, numbers, 1, e)
        assert np.array_equal(found, by_fractions(kind, codes, zeros, steps, numbers, 1, e))


def test_a_step_that_no_layout_stores_is_refused() -> None:
    codes = np.zeros((1, 4), np.int8)
    matrix = Matrix(kind=integer_kind(4), codes=codes, steps=np.array([[1 / 3]]), block=(1, 4))
    with pytest.raises(CheckpointError, match="more than 32 significant bits"):
        steps_of(matrix, 1, 0)


@pytest.mark.parametrize("kind", [integer_kind(4), E2M1], ids=lambda kind: str(kind.name))
def test_a_fused_merge_equals_the_product_that_is_rounded(kind: Kind) -> None:
    rng = np.random.default_rng(7)
    codes, zeros = drawn(kind, rng)
    left = rng.integers(-7, 8, (6, 5)).astype(np.float64)
    right = rng.integers(-7, 8, (5, 12)).astype(np.float64)
    steps = np.round(rng.normal(size=(6, 3)) * 4) / 4  # ties, and steps of zero
    matrix = Matrix(kind=kind, codes=codes, steps=steps, block=(1, 4), zeros=zeros)
    steps_, factor = steps_of(matrix, 3, -5), np.float64(3)
    once, fused = np.empty_like(codes), np.empty_like(codes)
    rest: tuple[Any, ...] = (codes, 0, float_grid(kind), steps_, 1)
    if not kind.is_float:
        rest = (codes, 0, zeros, steps_, limits_of(matrix), 1)
    rounding, merging = in_grid.ROUND[kind.is_float], in_grid.MERGE[kind.is_float]
    found = rounding(left @ right, factor, *rest, once)
    for dtype in (np.float64, np.float32):
        assert merging(left.astype(dtype), right.astype(dtype), factor, *rest, fused) == found
        assert np.array_equal(fused, once)
    assert 0 < found[0] < codes.size


@pytest.mark.parametrize("kind", [integer_kind(4), E2M1], ids=lambda kind: str(kind.name))
@pytest.mark.parametrize("group", [2, 16, 48, 96, 128, 2 * in_bytes.TILE + 96])
def test_bytes_of_wide_rows_round_as_single_codes_do(kind: Kind, group: int) -> None:
    """Rows that end within a tile, groups that end at its edges and within it, and odd counts."""
    rng, columns = np.random.default_rng(group), 2 * in_bytes.TILE + 96
    shape = (7, -(-columns // group))
    codes: npt.NDArray[Any] = rng.integers(0, 16, (7, columns)).astype(np.uint8)
    codes = codes if kind.is_float else codes.view(np.int8) - np.int8(8)
    zeros = None if kind.is_float else rng.integers(-8, 8, shape).astype(np.int16)
    steps = np.round(rng.normal(size=shape) * 4) / 4  # ties, signs and steps of zero
    matrix = Matrix(kind=kind, codes=codes, steps=steps, block=(1, group), zeros=zeros)
    left, right = (rng.integers(-7, 8, s).astype(np.float32) for s in ((5, 6), (6, columns)))
    wanted, numbers = np.empty_like(codes[2:]), (left @ right).astype(np.float64)
    rest: tuple[Any, ...] = (codes[2:], 2, float_grid(kind), steps_of(matrix, 3, -5), 1, wanted)
    if not kind.is_float:
        rest = (codes[2:], 2, zeros, steps_of(matrix, 3, -5), limits_of(matrix), 1, wanted)
    changed, size = in_grid.ROUND[kind.is_float](numbers, np.float64(3), *rest)
    assert 0 < changed < wanted.size
    rows = replace(matrix, codes=codes[2:])
    require_bytes_alike(rows, numbers, 3, -5, wanted, changed, first=2)
    # the same from factors
    offset = 0 if kind.is_float else 8
    stream = pack_bits(codes[2:], 4, columns // 2, offset=offset)
    packed, found = np.empty_like(stream), np.empty(wanted.shape, np.uint8)
    halved = np.ascontiguousarray(nibbles.halves(right))
    grid, steps_ = float_grid(kind) if kind.is_float else zeros, steps_of(matrix, 3, -5).of_bytes()
    merged = in_bytes.MERGE[kind.is_float](
        left, halved, np.float64(3), stream, 2, grid, steps_, 1, packed, found
    )
    assert np.array_equal(found.view(codes.dtype), wanted)
    assert merged[0] == changed
    assert merged[1] == pytest.approx(size, rel=1e-6)
