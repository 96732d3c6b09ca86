"""An update of zero leaves every weight as it is, whatever the exponents of its scales.

docs/format.md, section 6: only a non-zero update must keep its exponent in range, and N = 0 counts
as +0. A scale of 2^128 is infinite in float32, and infinity times zero is no number.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kilodelta
from kilodelta.errors import FileError
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.delta import Delta
from kilodelta.format.methods import Method
from kilodelta.format.packing import groups_size
from kilodelta.merging import cpu
from kilodelta.merging.gpu import stream
from kilodelta.merging.gpu.unit import UpdateScale
from tests.support import making

EXPONENTS = (127, 43, -128)
"""Of every scale: with two or three groups the update's unit is 2^254 or more, 2^86 or 2^129, and
2^-256 or less, all of which float32 lacks."""


def zeroed(path: Path, base: Path, method: Method, e: int, first: int = 0) -> Path:
    """A file of the method whose coefficients are zero (but the first), with scales 1 * 2^e."""
    made = making.delta(base, method)
    blob = np.zeros(made.blob.size, np.uint8)
    blob[0] = first
    scales = len(made.manifest.scales)

    def change(table: Any) -> None:
        pairs = bytes((1, e & 0xFF)) * scales
        table["coefficients"]["scales"] = base64.b64encode(pairs).decode()

    empty = Delta(manifest=made.manifest, blob=blob)
    return making.reforged(path, empty, change)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return making.write(tmp_path / "base.safetensors", making.model())


def positive(raw: Any, dtype: str) -> Any:
    """The bytes of a tensor with its zeros made positive, as the format says of N = 0."""
    bits = raw.view(np.uint32 if dtype == "F32" else np.uint16).copy()
    bits[bits == (0x80000000 if dtype == "F32" else 0x8000)] = 0
    return bits.view(np.uint8)


@pytest.mark.parametrize("e", EXPONENTS)
@pytest.mark.parametrize("method", making.METHODS, ids=making.ids)
def test_weights_stay_on_every_way_through(
    method: Method, e: int, base: Path, tmp_path: Path
) -> None:
    file = zeroed(tmp_path / "task.kd", base, method, e)
    checkpoint = Checkpoint.open(base)
    delta = kilodelta.load(file, base=checkpoint)
    for name, target in delta.targets.items():
        data = checkpoint.data(name)
        wanted = positive(data, target.dtype).tobytes()
        assert b"".join(p.tobytes() for p in cpu.merged(delta, target, data)) == wanted
        parts = stream.merged(delta, target, data, torch.device("cpu"))
        assert b"".join(p.tobytes() for p in parts) == wanted
        assert not delta.update(name).any()


@pytest.mark.parametrize("e", [127, -128])
@pytest.mark.parametrize("method", [m for m in making.METHODS if not m.full_rank], ids=making.ids)
def test_factors_for_a_graph_are_finite(method: Method, e: int, base: Path, tmp_path: Path) -> None:
    from kilodelta.export.peft.factors import float_factors

    delta = kilodelta.load(zeroed(tmp_path / "task.kd", base, method, e), base=base)
    left, right = float_factors(delta, "tall.weight")
    assert not (left @ right).any()
    assert np.isfinite(left).all()
    assert np.isfinite(right).all()


def test_a_bound_that_is_not_zero_is_still_held(base: Path, tmp_path: Path) -> None:
    from kilodelta.format.methods import UniLora

    file = zeroed(tmp_path / "task.kd", base, UniLora(rank=3, bases=50), 127, first=1)
    with pytest.raises(FileError, match="cannot be exact"):
        kilodelta.load(file, base=base)


def test_the_unit_of_an_update() -> None:
    assert UpdateScale(c=1, e=381, bound=0).unit == 1.0
    assert UpdateScale(c=1, e=-300, bound=0).unit == 1.0
    assert UpdateScale(c=1, e=-126, bound=1).unit == 2.0**-126


def test_the_file_says_what_it_says(base: Path, tmp_path: Path) -> None:
    """So that the tests above fail for their own reason."""
    method = making.METHODS[0]
    delta = kilodelta.load(zeroed(tmp_path / "task.kd", base, method, 127), base=base)
    assert delta.scale("tall.weight") == (1, 254)
    assert delta.blob.size == groups_size(method.groups(delta.target("tall.weight")), 8) * 5
    assert json.loads(delta.manifest.text())["coefficients"]["bits"] == 8
