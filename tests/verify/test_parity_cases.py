"""Inputs at given shapes: real tokens, real padding, nothing invented."""

from __future__ import annotations

import numpy as np

from kilodelta.verify.parity.cases import cases, fit, live

IDS = np.array([[5, 6, 7, 0, 0], [8, 9, 0, 0, 0]])
MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
BATCH = {"input_ids": IDS, "attention_mask": MASK}


def both(rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {name: (rows, columns) for name in BATCH}


def test_a_padded_case_keeps_what_is_padding() -> None:
    fitted = fit(BATCH, both(3, 4), padded=True)
    assert (fitted["input_ids"] == [[5, 6, 7, 5], [8, 9, 8, 9], [5, 6, 7, 5]]).all()
    assert (fitted["attention_mask"] == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0]]).all()
    assert fitted["attention_mask"].dtype == MASK.dtype


def test_a_full_case_has_real_tokens_everywhere() -> None:
    fitted = fit(BATCH, both(2, 7), padded=False)
    assert (fitted["input_ids"] == [[5, 6, 7, 5, 6, 7, 5], [8, 9, 8, 9, 8, 9, 8]]).all()
    assert fitted["attention_mask"].all()


def test_padding_on_the_left_is_padding_too() -> None:
    left = {"input_ids": IDS[:, ::-1], "attention_mask": MASK[:, ::-1]}
    fitted = fit(left, both(2, 1), padded=False)
    assert (fitted["input_ids"] == [[7], [9]]).all()


def test_a_row_of_padding_alone_does_not_divide_by_zero() -> None:
    empty = {"input_ids": np.zeros((1, 3), np.int64), "attention_mask": np.zeros((1, 3), np.int64)}
    assert fit(empty, both(1, 2), padded=True)["attention_mask"].tolist() == [[0, 0]]


def test_images_are_repeated_by_row() -> None:
    images = np.arange(2 * 3 * 2 * 2, dtype=np.float32).reshape(2, 3, 2, 2)
    fitted = fit({"pixel_values": images}, {"pixel_values": (3, 3, 2, 2)}, padded=False)
    assert (fitted["pixel_values"] == images[[0, 1, 0]]).all()


def test_equal_shapes_are_run_once() -> None:
    fixed = {name: ((2, 4), (2, 4), (4, 4)) for name in BATCH}
    assert [(case.name, case.shape) for case in cases(BATCH, fixed)] == [
        ("smallest", (2, 4)),
        ("largest", (4, 4)),
    ]


def test_only_the_usual_case_is_padded() -> None:
    profile = {name: ((1, 2), (2, 5), (2, 6)) for name in BATCH}
    live_tokens = {c.name: c.batch["attention_mask"].sum(1).tolist() for c in cases(BATCH, profile)}
    assert live_tokens == {"smallest": [2], "usual": [3, 2], "largest": [6, 6]}


def test_padding_is_not_compared() -> None:
    states = np.arange(2 * 5 * 3).reshape(2, 5, 3)
    assert (live(states, BATCH) == np.concatenate([states[0, :3], states[1, :2]])).all()
    logits = np.zeros((2, 5))
    assert live(logits, BATCH) is logits
