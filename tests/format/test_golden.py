"""Files that released versions wrote, made by scalar code alone, read for ever."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

import kilodelta
from kilodelta.format.foreign import COMPAT
from kilodelta.merging import cpu
from kilodelta.verify.digests.proof import prove

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted(GOLDEN.glob("*/*.kd"))
EXACT = [path for path in FILES if kilodelta.inspect(path).exact]
FLOATS = [path for path in FILES if path not in EXACT]


def name(path: Path) -> str:
    return f"{path.parent.name}-{path.stem}"


def test_there_are_golden_files_of_every_method() -> None:
    methods = {kilodelta.inspect(path).method["name"] for path in EXACT}
    assert methods == {"nola", "randlora", "lora", "vera", "unilora"}
    forms = {kilodelta.inspect(path).method["name"] for path in FLOATS}
    assert {"peft-randlora", "official-nola"} <= forms <= set(COMPAT)


@pytest.mark.parametrize("path", FLOATS, ids=name)
def test_compatibility_forms_give_the_scalar_updates_bit_for_bit(path: Path) -> None:
    base = kilodelta.Checkpoint.open(path.parent / "base.safetensors")
    delta = kilodelta.load(path, base=base)
    expected = json.loads(path.with_suffix(".json").read_text())
    assert list(delta.targets) == list(expected["targets"])
    for target, wanted in expected["targets"].items():
        assert np.array_equal(delta.update(target), np.array(wanted["update"], np.float32)), target
        parts = cpu.merged(delta, delta.target(target), base.data(target))
        assert b"".join(part.tobytes() for part in parts).hex() == wanted["merged"], target


@pytest.mark.parametrize("path", EXACT, ids=name)
def test_updates_and_merged_weights_are_the_scalar_ones(path: Path) -> None:
    base = kilodelta.Checkpoint.open(path.parent / "base.safetensors")
    delta = kilodelta.load(path, base=base)
    expected = json.loads(path.with_suffix(".json").read_text())
    assert list(delta.targets) == list(expected["targets"])
    for target, wanted in expected["targets"].items():
        assert np.array_equal(delta.expand(target), np.array(wanted["dq"])), target
        assert delta.scale(target) == (wanted["c"], wanted["e"])
        parts = cpu.merged(delta, delta.target(target), base.data(target))
        assert b"".join(part.tobytes() for part in parts).hex() == wanted["merged"], target


@pytest.mark.parametrize("path", FILES, ids=name)
def test_the_file_proves_itself(path: Path) -> None:
    proof = prove(path.parent / "base.safetensors", path)
    assert proof.result == json.loads(path.with_suffix(".json").read_text())["result"]


@pytest.mark.parametrize("path", FILES, ids=name)
def test_writing_it_again_gives_the_same_bytes(path: Path, tmp_path: Path) -> None:
    count = kilodelta.load(path).save(tmp_path / "again.kd")
    assert (tmp_path / "again.kd").read_bytes() == path.read_bytes()
    assert count == path.stat().st_size


@pytest.mark.parametrize("path", FILES, ids=name)
def test_every_safetensors_reader_opens_it(path: Path) -> None:
    from safetensors.numpy import load_file

    found = load_file(path)
    assert found["coefficients"].dtype == np.uint8
    assert found["extra.norm.bias"].tolist() == [0.5, -1.0, 2.0, 0.25]


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_delta_travels_between_processes(path: Path) -> None:
    delta = kilodelta.load(path)
    found = pickle.loads(pickle.dumps(delta))
    assert found.manifest == delta.manifest
    assert np.array_equal(found.blob, delta.blob)
