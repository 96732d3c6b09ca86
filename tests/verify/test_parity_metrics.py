"""The seven numbers: typed-in values, the textbook formulas as loops, and what is not finite."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kilodelta.errors import ProofError
from kilodelta.verify.parity import metrics as module
from kilodelta.verify.parity.metrics import Metrics, absolute_error, compare

INF, NAN = math.inf, math.nan


def metrics(actual: object, reference: object, *, classes: bool = False) -> Metrics:
    return compare(np.asarray(actual), np.asarray(reference), classes=classes)


def test_typed_in_values() -> None:
    got = metrics([[3.0, 4.0], [0.0, 1.0]], [[3.0, 0.0], [0.0, 2.0]])
    # Errors 0, 4, 0, 1; |error| = sqrt 17, |reference| = sqrt 13; row cosines 3/5 and 1.
    assert got.max_abs == 4.0
    assert got.mean_abs == 1.25
    assert got.p99_abs == 4.0
    assert got.relative_l2 == pytest.approx(math.sqrt(17 / 13), rel=1e-15)
    assert got.relative_max == pytest.approx(4 / 3, rel=1e-15)
    assert got.cosine == pytest.approx(0.8, rel=1e-15)
    assert (got.top1, got.kl) == (None, None)


def test_p99_leaves_out_the_last_hundredth() -> None:
    # 201 errors 0..200: the 99th percentile stands at rank 0.99 * 200 = 198.
    assert metrics(np.arange(201.0), np.zeros(201)).p99_abs == 198.0


def test_kl_and_top1_against_scalar_loops() -> None:
    actual, reference = [[1.0, 2.0, 0.5], [0.0, 0.0, 3.0]], [[1.5, 1.0, 0.0], [0.0, 1.0, 3.0]]
    expected = 0.0
    for a, r in zip(actual, reference, strict=True):
        p = [math.exp(x) / sum(map(math.exp, r)) for x in r]
        q = [math.exp(x) / sum(map(math.exp, a)) for x in a]
        expected += sum(pi * math.log(pi / qi) for pi, qi in zip(p, q, strict=True)) / 2
    got = metrics(actual, reference, classes=True)
    assert got.kl == pytest.approx(expected, rel=1e-12)
    assert got.top1 == 0.5


def test_a_tie_in_the_reference_may_be_broken_either_way() -> None:
    assert metrics([[1.0, 2.0]], [[5.0, 5.0]], classes=True).top1 == 1.0
    assert metrics([[5.0, 5.0]], [[1.0, 2.0]], classes=True).top1 == 0.0


def test_zeros_have_a_meaning() -> None:
    both = metrics([0.0, 0.0], [0.0, 0.0])
    assert (both.relative_l2, both.relative_max, both.cosine) == (0.0, 0.0, 1.0)
    reference = metrics([1.0, 0.0], [0.0, 0.0])
    assert (reference.relative_l2, reference.relative_max, reference.cosine) == (INF, INF, 0.0)
    actual = metrics([0.0, 0.0], [1.0, 0.0])
    assert (actual.relative_l2, actual.relative_max, actual.cosine) == (1.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("actual", "reference", "error"),
    [
        (NAN, NAN, 0.0),
        (INF, INF, 0.0),
        (-INF, -INF, 0.0),
        (INF, -INF, INF),
        (NAN, 1.0, INF),
        (1.0, NAN, INF),
        (INF, 1.0, INF),
        (1.0, -INF, INF),
        (NAN, INF, INF),
        (-0.0, 0.0, 0.0),
    ],
)
def test_values_that_are_not_finite(actual: float, reference: float, error: float) -> None:
    assert absolute_error(np.array([actual]), np.array([reference]))[0] == error
    got = metrics([[actual, 1.0]], [[reference, 1.0]], classes=True)
    assert got.max_abs == got.mean_abs == got.p99_abs == error
    assert got.relative_l2 == got.relative_max == error
    assert got.cosine == (pytest.approx(1.0, rel=1e-15) if error == 0.0 else 0.0)
    assert not any(value is None or math.isnan(value) for value in vars(got).values())


def test_the_largest_value_is_infinite_beside_nan() -> None:
    """NaN has no size, so the largest of all magnitudes does not tell whether one is beyond."""
    assert metrics([NAN, 65504.0], [NAN, INF]).max_abs == 0.0


LARGEST = [float(np.finfo(t).max) for t in (np.float16, np.float32, np.float64)]
BFLOAT16_LARGEST = 2.0**127 * (2 - 2.0**-7)


@pytest.mark.parametrize("largest", [*LARGEST, BFLOAT16_LARGEST])
def test_the_largest_value_of_a_type_is_meant_as_infinity(largest: float) -> None:
    """Models mask scores with `torch.finfo(dtype).min`, another number in each precision."""
    got = metrics([[-largest, 1.0, 2.0]], [[-LARGEST[2], 1.0, 2.0]], classes=True)
    assert (got.max_abs, got.relative_l2, got.kl, got.top1) == (0.0, 0.0, 0.0, 1.0)
    assert got.cosine == pytest.approx(1.0, rel=1e-15)
    assert metrics([-INF, 1.0], [-largest, 1.0]).max_abs == 0.0
    assert metrics([INF, 1.0], [-largest, 1.0]).max_abs == INF
    assert metrics([-largest, 3.0], [-largest, 1.0]).relative_l2 == 2.0  # it hides nothing else


def test_such_a_value_is_a_number_beside_another() -> None:
    assert metrics([65503.0, 1.0], [65504.0, 1.0]).max_abs == 1.0
    assert metrics([-1e9, 1.0], [-LARGEST[1], 1.0]).relative_l2 > 1e30


def test_integers_are_right_or_wrong() -> None:
    got = metrics([3, 1, 9, 9], np.array([3, 1, 9, 200]))
    assert got.relative_l2 == got.relative_max == 0.25
    assert got.max_abs == 191
    assert metrics([True, False], np.array([True, True])).relative_l2 == 0.5
    assert metrics(np.array([1.0, 2.0], np.float32), np.array([1, 2])).relative_l2 == 0.0


@pytest.mark.parametrize("shape", [(7, 3), (2, 5, 3), (21,)])
def test_blocks_change_no_metric(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    actual, reference = rng.normal(size=shape), rng.normal(size=shape)
    whole = compare(actual, reference, classes=True)
    monkeypatch.setattr(module, "BLOCK", 6)
    for name, value in vars(compare(actual, reference, classes=True)).items():
        assert value == pytest.approx(getattr(whole, name), rel=1e-13), name


def test_a_masked_class_counts_nothing() -> None:
    got = metrics([[-INF, 1.0, 2.0]], [[-INF, 1.0, 2.0]], classes=True)
    assert (got.kl, got.top1, got.max_abs) == (0.0, 1.0, 0.0)
    assert metrics([[-INF, 0.0]], [[0.0, 0.0]], classes=True).kl == INF


def test_float64_is_used_whatever_comes_in() -> None:
    # 2049 is no float16 and the difference 1e-8 no float32: both need float64.
    single, half = np.array([1.0], np.float32), np.array([2048.0], np.float16)
    assert metrics(single, [1.0 + 1e-8]).max_abs == pytest.approx(1e-8, rel=1e-7)
    assert metrics(half, [2049.0]).max_abs == 1.0


def test_huge_values_do_not_overflow() -> None:
    got = metrics([1e200, 0.0], [0.0, 1e200])
    assert got.relative_l2 == pytest.approx(math.sqrt(2.0), rel=1e-15)
    assert got.cosine == 0.0


def test_empty_and_scalar_outputs() -> None:
    empty = metrics(np.zeros((0, 4)), np.zeros((0, 4)), classes=True)
    assert (empty.max_abs, empty.cosine, empty.top1, empty.kl) == (0.0, 1.0, 1.0, 0.0)
    assert metrics(2.0, 1.0).relative_l2 == 1.0


def test_shapes_must_agree() -> None:
    with pytest.raises(ProofError, match=r"shape \(2,\), the reference \(3,\)"):
        metrics([1.0, 2.0], [1.0, 2.0, 3.0])


def test_json_is_strict() -> None:
    text = json.dumps(metrics([1.0], [0.0]).to_json(), allow_nan=False)
    assert json.loads(text)["relative_l2"] == "inf"


values = st.floats(allow_nan=True, allow_infinity=True, width=32)


@given(st.lists(st.tuples(values, values), min_size=2, max_size=8))
def test_nothing_is_ever_nan(pairs: list[tuple[float, float]]) -> None:
    actual, reference = np.array(pairs, dtype=np.float32).T
    got = metrics(actual[None], reference[None], classes=True)
    assert not any(value is None or math.isnan(value) for value in vars(got).values())
    assert 0.0 <= got.p99_abs <= got.max_abs
    assert -1.0 <= got.cosine <= 1.0
