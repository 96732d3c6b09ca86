"""Requests that a runtime would answer with an error of its own nodes, or with other numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kilodelta.device import Device
from kilodelta.device.golden import golden
from kilodelta.device.golden.golden import Golden
from kilodelta.device.request import check_request, read_known
from kilodelta.errors import InputError
from tests.support.devices import Bench

IDS = np.full((3, 6), 7)
BATCH: dict[str, Any] = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}


@pytest.fixture
def known(tmp_path: Path) -> dict[str, Any]:
    """As a bundle keeps them: of other lengths than a request's."""
    inputs = {name: np.ones((2, 4), np.int64) for name in BATCH}
    golden.write(tmp_path / golden.FILE, Golden(inputs=inputs, outputs={"y": np.ones(2)}))
    return read_known(tmp_path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"attention_mask": None}, "the inputs lack attention_mask"),
        ({"input_ids": IDS - 8}, "input input_ids holds -1"),
        ({"input_ids": IDS[0]}, "input input_ids has shape (6,)"),
        ({"input_ids": IDS[:, :0]}, "input input_ids has shape (3, 0)"),
        ({"attention_mask": np.ones((2, 6))}, "rows differ: input_ids 3, attention_mask 2"),
        ({"attention_mask": np.ones((3, 5))}, "6 tokens a row, attention_mask has 5"),
        ({"token_type_ids": IDS}, "token_type_ids is no input of this model"),
    ],
)
def test_what_does_not_fit_is_named(
    change: dict[str, Any], expected: str, known: dict[str, Any]
) -> None:
    batch = {name: values for name, values in {**BATCH, **change}.items() if values is not None}
    with pytest.raises(InputError) as caught:
        check_request(batch, known)
    assert expected in caught.value.what


def test_requests_of_any_size_are_taken(known: dict[str, Any], tmp_path: Path) -> None:
    check_request(BATCH, known)
    check_request({name: values[:0] for name, values in BATCH.items()}, known)  # no rows, no error
    check_request({**BATCH, "token_type_ids": np.zeros_like(IDS)}, known)  # as tokenizers add them
    (tmp_path / golden.FILE).write_bytes(b"damaged")
    assert read_known(tmp_path) == {}
    check_request({}, {})


def test_a_device_looks_at_its_requests(bench: Bench) -> None:
    with pytest.raises(InputError, match="the inputs lack "):
        Device(bench.device).run({})
