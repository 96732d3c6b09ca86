"""What differs between two models or two deltas, against numpy on whole tensors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from kilodelta.errors import CheckpointError, InputError
from kilodelta.files import safetensors
from kilodelta.files.dtypes import FLOATS
from kilodelta.files.tensor import RawTensor
from kilodelta.format.file import load
from kilodelta.merging import diff as module
from kilodelta.merging.diff import (
    CHANGED,
    ONLY_FIRST,
    ONLY_SECOND,
    OTHER_SHAPE,
    OTHER_TYPE,
    diff,
)
from tests.support.processes import GOLDEN

RANDOM = np.random.default_rng(3)


def model(path: Path, **tensors: RawTensor) -> Path:
    safetensors.write(path, tensors)
    return path


def floats(values: object, dtype: str = "F32") -> RawTensor:
    array = np.asarray(values, np.float32)
    data = FLOATS[dtype].narrow(array).reshape(-1).view(np.uint8)
    return RawTensor(dtype=dtype, shape=array.shape, data=data)


def test_every_kind_of_change_is_told_apart(tmp_path: Path) -> None:
    a = RANDOM.standard_normal((5, 7)).astype(np.float32)
    b = a + np.float32(0.25) * RANDOM.standard_normal((5, 7)).astype(np.float32)
    exact = np.array([1.0, -2.5, 0.0], np.float32)
    whole = RawTensor(dtype="I64", shape=(2,), data=np.array([1, 2], "<i8").view(np.uint8))
    other = RawTensor(dtype="I64", shape=(2,), data=np.array([1, 3], "<i8").view(np.uint8))
    first = model(
        tmp_path / "a.safetensors",
        same=floats(a),
        moved=floats(a),
        typed=floats(exact, "BF16"),
        gone=floats([1.0]),
        grown=floats([1.0]),
        number=whole,
        zero=floats([0.0, 0.0]),
        nan=floats([math.nan, 1.0]),
        half=floats([1.0, 1.0]),
    )
    second = model(
        tmp_path / "b.safetensors",
        same=floats(a),
        moved=floats(b),
        typed=floats(exact, "F32"),
        new=floats([1.0]),
        grown=floats([1.0, 2.0]),
        number=other,
        zero=floats([0.0, 3.0]),
        nan=floats([math.nan, 2.0]),
        half=floats([math.nan, 1.0]),
    )
    found = diff(first, second)
    rows = {row.name: row for row in found.rows}
    assert {n: r.change for n, r in rows.items()} == {
        "moved": CHANGED,
        "typed": OTHER_TYPE,
        "gone": ONLY_FIRST,
        "new": ONLY_SECOND,
        "grown": OTHER_SHAPE,
        "number": CHANGED,
        "zero": CHANGED,
        "nan": CHANGED,
        "half": CHANGED,
    }
    assert found.same == 1
    wide = b.astype(float) - a
    moved = rows["moved"]
    assert moved.relative == pytest.approx(
        np.linalg.norm(wide) / np.linalg.norm(a.astype(float)), rel=1e-12
    )
    assert moved.largest == pytest.approx(np.abs(wide).max(), rel=1e-12)
    energy = float((wide**2).sum())
    assert moved.share == pytest.approx(energy / (energy + 10.0), rel=1e-12)
    assert rows["zero"].relative == math.inf
    assert rows["nan"].relative == pytest.approx(1.0)
    assert math.isnan(rows["half"].largest or 0.0)
    assert rows["number"].relative is None
    assert rows["grown"].kinds == ("F32 [1]", "F32 [2]")
    assert found.rows[0].name == "zero"
    text = json.dumps(found.to_json(), allow_nan=False)
    assert json.loads(text)["equal"] is False


def test_blocks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = RANDOM.standard_normal((2, 1000)).astype(np.float32)
    first = model(tmp_path / "a.safetensors", w=floats(a, "BF16"))
    second = model(tmp_path / "b.safetensors", w=floats(b, "F16"))
    [whole] = diff(first, second).rows
    monkeypatch.setattr(module, "_BLOCK", 7)
    [pieces] = diff(first, second).rows
    assert pieces.relative == pytest.approx(whole.relative, rel=1e-12)
    assert pieces.largest == whole.largest


def test_deltas_by_manifest_and_by_update() -> None:
    one, two, base = (GOLDEN / n for n in ("lora-4.kd", "lora-8.kd", "base.safetensors"))
    assert diff(one, one).equal
    assert diff(one, two).facts["bits"] == (4, 8)
    assert diff(one, two).rows == ()
    found = diff(one, two, base=base)
    a, b = load(one, base=base), load(two, base=base)
    for row in found.rows:
        x, y = a.update(row.name).astype(float), b.update(row.name).astype(float)
        assert row.relative == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), rel=1e-9)
    assert len(found.rows) + found.same == len({*a.targets, *b.targets})
    assert sum(row.share or 0 for row in found.rows) == pytest.approx(1.0)
    assert diff(one, one, base=base).equal


def test_what_is_no_model_is_said_beside_a_delta() -> None:
    for absent in (GOLDEN / "absent.safetensors", GOLDEN / "make.py", GOLDEN.parent):
        with pytest.raises(CheckpointError):
            diff(GOLDEN / "lora-4.kd", absent)


def test_a_model_is_not_compared_with_a_delta() -> None:
    with pytest.raises(InputError, match="a model and a delta"):
        diff(GOLDEN / "base.safetensors", GOLDEN / "lora-4.kd")
    base = GOLDEN / "base.safetensors"
    with pytest.raises(InputError, match=r"for comparing \.kd"):
        diff(base, base, base=base)
