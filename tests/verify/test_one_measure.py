"""Agreement is one idea in two backends: what compress reports is what verify measures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kilodelta.compress.distill.learn.comparisons import Classes, Comparison, Measures, States
from kilodelta.verify.parity.metrics import compare

INF = float("inf")
SMALLEST = float(np.finfo(np.float32).min)
"""What Hugging Face models write into a masked logit instead of minus infinity."""


def drawn(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(5).normal(size=shape).astype(np.float32) * 3


CASES = {
    "scores": (drawn(2, 40, 7), drawn(2, 40, 7)[:, ::-1]),
    "equal": (drawn(9, 5), drawn(9, 5)),
    "ties in the teacher": ([[1.0, 2.0, 0.0], [3.0, 0.0, 1.0]], [[5.0, 5.0, 1.0], [0.0, 2.0, 2.0]]),
    "ties in the student": ([[5.0, 5.0, 1.0]], [[1.0, 2.0, 0.0]]),
    "masked": ([[1.0, -INF, 0.0], [0.5, SMALLEST, 2.0]], [[2.0, -INF, 1.0], [1.0, SMALLEST, 0.0]]),
    "masked in two ways": ([[1.0, SMALLEST, 0.0]], [[1.0, -INF, 0.5]]),
    "one class": ([[1.0], [2.0]], [[3.0], [-1.0]]),
    "large": ([[90.0, 0.0], [0.0, -90.0]], [[0.0, 90.0], [0.0, 90.0]]),
}


def distilled(comparison: Comparison, student: object, teacher: object) -> Measures:
    """Measure as `compress` does, every position counting once."""
    ours, theirs = (torch.tensor(np.array(x, np.float32)) for x in (student, teacher))
    return comparison.measures(comparison.sums(ours, theirs, torch.ones(ours.shape[:-1])))


@pytest.mark.parametrize("case", CASES)
def test_scores_agree_alike_in_both_backends(case: str) -> None:
    student, teacher = (np.array(x, np.float32) for x in CASES[case])
    ours = distilled(Classes(), student, teacher)
    theirs = compare(student, teacher, classes=True)
    assert ours.agreement == theirs.top1
    # float32 against float64: each log-probability is off by some ulp of its size, here <= 180.
    assert ours.divergence == pytest.approx(theirs.kl, abs=180 * 2**-22)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (drawn(2, 40, 7), drawn(2, 40, 7)[:, ::-1]),
        ([[0.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]),
        ([[3e-12, 4e-12]], [[3e-12, 4e-12]]),
        ([[3e12, 4e12]], [[-4e12, 3e12]]),
    ],
    ids=["drawn", "zeros", "tiny", "huge"],
)
def test_vectors_agree_alike_in_both_backends(student: object, teacher: object) -> None:
    ours = distilled(States(), student, teacher)
    theirs = compare(np.array(student, np.float32), np.array(teacher, np.float32)).cosine
    assert ours.agreement == pytest.approx(theirs, abs=8 * 2**-23)  # width 7: 8 roundings
    assert ours.divergence == pytest.approx(1 - theirs, abs=8 * 2**-23)
