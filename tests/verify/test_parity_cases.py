"""Inputs at given shapes: real tokens, real padding, nothing invented, nothing periodic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from kilodelta.verify.parity.cases import cases, live, token_axis
from kilodelta.verify.parity.fitting import Padding, fit

IDS = np.array([[5, 6, 7, 0, 0], [8, 9, 0, 0, 0]])
MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
BATCH = {"input_ids": IDS, "attention_mask": MASK}
LONG = {"input_ids": np.arange(1, 41).reshape(2, 20), "attention_mask": np.ones((2, 20), int)}


def both(rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {name: (rows, columns) for name in BATCH}


def test_a_row_keeps_its_tokens_and_its_padding() -> None:
    fitted = fit(BATCH, both(3, 4), padding="right")
    mask = fitted["attention_mask"]
    assert mask.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert mask.dtype == MASK.dtype
    rows = [row[kept.astype(bool)].tolist() for row, kept in zip(*fitted.values(), strict=True)]
    assert rows == [[5, 6, 7], [8, 9], [5, 6, 7]]


def test_padding_may_be_on_the_left() -> None:
    fitted = fit(BATCH, both(2, 5), padding="left")
    assert fitted["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert fitted["input_ids"][0, 2:].tolist() == [5, 6, 7]
    assert fitted["input_ids"][1, 3:].tolist() == [8, 9]


@pytest.mark.parametrize("padding", ["right", "left"])
def test_padded_positions_hold_real_tokens_so_that_ignoring_the_mask_shows(
    padding: Padding,
) -> None:
    fitted = fit(BATCH, both(2, 64), padding=padding)
    hidden = fitted["input_ids"][fitted["attention_mask"] == 0]
    assert set(hidden) == {5, 6, 7, 8, 9}


def test_a_full_row_goes_on_with_a_shuffle_of_all_tokens() -> None:
    fitted = fit(BATCH, both(2, 200), padding="none")
    assert fitted["attention_mask"].all()
    [first, second] = fitted["input_ids"]
    assert first[:3].tolist() == [5, 6, 7]
    assert second[:2].tolist() == [8, 9]
    assert set(first) == set(second) == {5, 6, 7, 8, 9}
    for period in range(1, 60):  # repetition would let roundings of a sum point the same way
        assert (first[3:-period] != first[3 + period :]).any()
    assert all(abs((first == token).sum() - 40) <= 2 for token in range(5, 10))
    again = fit(BATCH, both(2, 200), padding="none")["input_ids"]
    assert (again == fitted["input_ids"]).all()


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_one_row_is_padded_though_all_texts_are_long(rows: int, padding: Padding) -> None:
    mask = fit(LONG, both(rows, 8), padding=padding)["attention_mask"]
    assert mask.sum(1).tolist() == [8] * (rows - 1) + [4]
    assert mask[-1, 0 if padding == "right" else -1] == 1


def test_what_lies_along_the_tokens_moves_with_them() -> None:
    boxes = IDS[..., None] * np.array([1, 10])
    batch = {**BATCH, "token_type_ids": IDS * 3, "bbox": boxes}
    shapes = {**both(3, 9), "token_type_ids": (3, 9), "bbox": (3, 9, 2)}
    fitted = fit(batch, shapes, padding="left")
    assert (fitted["token_type_ids"] == fitted["input_ids"] * 3).all()
    assert (fitted["bbox"] == fitted["input_ids"][..., None] * np.array([1, 10])).all()


def test_positions_count_on() -> None:
    batch = {**BATCH, "position_ids": np.tile(np.arange(2, 7), (2, 1))}
    shapes = {**both(2, 6), "position_ids": (2, 6)}
    full = fit(batch, shapes, padding="none")["position_ids"]
    assert full.tolist() == [[2, 3, 4, 5, 6, 7]] * 2
    left = fit(batch, shapes, padding="left")["position_ids"]
    assert left.tolist() == [[2, 2, 2, 2, 3, 4], [2, 2, 2, 2, 2, 3]]


def test_padding_on_the_left_is_padding_too() -> None:
    left = {"input_ids": IDS[:, ::-1], "attention_mask": MASK[:, ::-1]}
    fitted = fit(left, both(2, 1), padding="none")
    assert (fitted["input_ids"] == [[7], [9]]).all()


def test_a_row_of_padding_alone_does_not_divide_by_zero() -> None:
    empty = {"input_ids": np.zeros((1, 3), np.int64), "attention_mask": np.zeros((1, 3), np.int64)}
    assert fit(empty, both(1, 2), padding="right")["attention_mask"].tolist() == [[0, 0]]


def test_without_a_mask_integers_are_shuffled_alike_and_floats_mirrored() -> None:
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    batch = {"ids": ids, "keep": ids > 3, "sound": np.array([[0, 1, 2], [3, 4, 5]], np.float32)}
    fitted = fit(batch, {name: (3, 40) for name in batch}, padding="none")
    assert fitted["ids"][:, :3].tolist() == [[1, 2, 3], [4, 5, 6], [1, 2, 3]]
    assert (fitted["keep"] == (fitted["ids"] > 3)).all()
    assert (fitted["ids"][0, 3:-3] != fitted["ids"][0, 6:]).any()
    assert fitted["sound"][0, :8].tolist() == [0, 1, 2, 2, 1, 0, 0, 1]


def test_images_are_repeated_by_row() -> None:
    images = np.arange(2 * 3 * 2 * 2, dtype=np.float32).reshape(2, 3, 2, 2)
    fitted = fit({"pixel_values": images}, {"pixel_values": (3, 3, 2, 2)}, padding="none")
    assert (fitted["pixel_values"] == images[[0, 1, 0]]).all()


def named(profile: Mapping[str, Sequence[tuple[int, ...]]], *, left: bool = False) -> list[str]:
    return [case.name for case in cases(LONG, profile, left=left)]


def test_the_cases_of_a_profile() -> None:
    profile = {name: ((1, 2), (2, 5), (2, 6)) for name in BATCH}
    found = cases(LONG, profile, left=True)
    assert [(case.name, case.shape) for case in found] == [
        ("smallest", (1, 2)), ("usual", (2, 5)), ("largest", (2, 6)), ("left-padded", (2, 5)),
    ]  # fmt: skip
    live_tokens = {case.name: case.batch["attention_mask"].sum(1).tolist() for case in found}
    assert live_tokens == {
        "smallest": [2], "usual": [5, 2], "largest": [6, 6], "left-padded": [5, 2],
    }  # fmt: skip
    assert named(profile) == ["smallest", "usual", "largest"]


def test_a_fixed_shape_is_run_full_and_padded() -> None:
    fixed = {name: ((2, 4),) * 3 for name in BATCH}
    assert named(fixed) == ["smallest", "usual"]
    assert named(fixed, left=True) == ["smallest", "usual", "left-padded"]
    assert named({name: ((2, 1),) * 3 for name in BATCH}, left=True) == ["smallest"]


def test_equal_shapes_without_a_mask_are_run_once() -> None:
    assert named({"input_ids": ((2, 4), (2, 4), (4, 4))}) == ["smallest", "largest"]


def test_padding_is_not_compared() -> None:
    states = np.arange(2 * 5 * 3).reshape(2, 5, 3)
    assert (live(states, BATCH) == np.concatenate([states[0, :3], states[1, :2]])).all()
    logits = np.zeros((2, 5))
    assert live(logits, BATCH) is logits
    assert live(logits, BATCH, axis=1).shape == (5,)
    attention = np.zeros((2, 4, 5, 5))
    assert live(attention, BATCH, axis=2).shape == (5, 4, 5)


def test_the_axis_of_tokens_is_the_one_that_follows_them() -> None:
    assert token_axis([(1, 4), (2, 9)], [4, 9]) == 1
    assert token_axis([(1, 2, 4, 4), (2, 2, 9, 9)], [4, 9]) == 2
    assert token_axis([(1, 4), (2, 4)], [4, 9]) is None  # four classes
    assert token_axis([(1, 4), (2, 4)], [4, 4]) is None  # cannot be told
    assert token_axis([(1, 4), (2, 9)], [None, None]) is None
