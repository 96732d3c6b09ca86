"""Patch mode for engines: a map that is measured, and proved by a build that was not measured."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kilodelta.device.modes.patch import promised_digest
from kilodelta.errors import CheckpointError, ExportError, FileError, ProofError
from kilodelta.export.merge.checkpoint import merge
from kilodelta.export.patching import promised
from kilodelta.export.patching.engine.map import make_engine_map
from kilodelta.export.patching.make_map import write_rest
from kilodelta.export.patching.map import PatchMap
from kilodelta.export.patching.map_file import read_map, write_map
from kilodelta.export.patching.rewrite import patch
from kilodelta.export.patching.strided import put_place
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.dtypes import FLOATS
from kilodelta.files.tensor import RawTensor
from kilodelta.format.methods import Lora
from kilodelta.format.targets import Patterns
from tests.doubles.engine_compiler import SHAPES, Compiler, engine, values
from tests.support import making

PLACED = {"plain", "turned", "joined.q", "joined.k", "split", "bias", "widened", "twice"}
MATRICES = Patterns(include=("plain", "turned", "joined.*", "split", "twice"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tensors = {n: ("F32", a.shape, a.tobytes()) for n, a in values().items()}
    return making.write(tmp_path / "base.safetensors", tensors)


def mapped(base: Path, folder: Path, dtype: str = "F16", spoil: Any = None) -> PatchMap:
    return make_engine_map(
        folder / "model.engine",
        Checkpoint.open(base),
        Compiler(values(), dtype, spoil),
        dtype=dtype,
        weights=SHAPES,
    )


def tuned_values(base: Path, delta: Any, folder: Path) -> dict[str, Any]:
    merge(base, delta, folder / "merged.safetensors")
    merged = Checkpoint.open(folder / "merged.safetensors")
    infos = [merged.info(name) for name in merged.names]
    return {i.name: merged.data(i.name).view(np.float32).reshape(i.shape) for i in infos}


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_patched_engine_is_a_built_one(base: Path, tmp_path: Path, dtype: str) -> None:
    places = mapped(base, tmp_path, dtype)
    assert set(places.places) == PLACED
    delta = making.delta(base, Lora(rank=2), patterns=MATRICES)
    rest = write_rest(places, base, tmp_path / "rest.safetensors")
    wanted = engine(tuned_values(base, delta, tmp_path), dtype)
    stated = f"sha256:{hashlib.sha256(wanted).hexdigest()}"
    model = tmp_path / "model.engine"
    out = tmp_path / "tuned.engine"
    patch(model, delta, out, places=places, base=rest, promised=stated)
    assert out.read_bytes() == wanted
    assert model.read_bytes() == engine(values(), dtype)


def test_layouts_are_told_apart(base: Path, tmp_path: Path) -> None:
    places = mapped(base, tmp_path).places
    [turned], [query] = places["turned"], places["joined.q"]
    assert (turned.transposed, turned.stride, turned.shape) == (True, 0, (8, 6))
    assert (query.transposed, query.stride, query.shape) == (True, 20, (8, 5))
    assert [(p.first, p.shape) for p in places["split"]] == [(0, (4, 4)), (4, (4, 4)), (8, (4, 4))]
    assert sorted(p.transposed for p in places["twice"]) == [False, True]
    [widened] = places["widened"]
    assert (widened.dtype, widened.through) == ("F32", "F16")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("folded", "its values are nowhere: TensorRT folded, quantised or reordered them"),
        ("quantised", "its values are nowhere"),
        ("stated", "texts in the engine state its values"),
        ("short", "too few numbers"),
        ("ones", "all its values are equal"),
    ],
)
def test_what_has_no_place_is_refused_by_name(
    base: Path, tmp_path: Path, name: str, why: str
) -> None:
    places = mapped(base, tmp_path)
    changed = values()[name] + 1
    delta = making.delta(base, Lora(rank=1), patterns=MATRICES)
    with_extra = dataclasses.replace(delta, extras={name: RawTensor.of(changed)}, probes={})
    with pytest.raises(ExportError, match=rf"has no place in the engine\n  {name}: .*{why}") as e:
        patch(tmp_path / "model.engine", with_extra, tmp_path / "t.engine", places=places)
    assert "--mode refit" in e.value.fix
    assert not (tmp_path / "t.engine").exists()


def test_a_weight_that_is_also_in_another_form_refutes_the_map(base: Path, tmp_path: Path) -> None:
    """Its places are all there, but a build of other values differs elsewhere as well."""

    def spoil(data: bytes, held: Mapping[str, Any], count: int) -> bytes:
        return data + FLOATS["F32"].narrow(held["plain"].sum(axis=0)).tobytes()

    with pytest.raises(
        ExportError, match=r"a further fine-tune none is the patched engine; \d+ of"
    ):
        mapped(base, tmp_path, spoil=spoil)


def test_vectors_that_were_folded_into_others_are_refused(base: Path, tmp_path: Path) -> None:
    """The bias has a place, and a product of it has another: matrices can be patched still."""

    def spoil(data: bytes, held: Mapping[str, Any], count: int) -> bytes:
        return data + bytes((held["bias"] * 2.5).astype(np.float32).tobytes())

    places = mapped(base, tmp_path, spoil=spoil)
    assert set(places.places) == PLACED - {"bias", "widened"}
    assert "computed from it" in places.refused["bias"]


def test_builds_that_never_agree_are_refused(base: Path, tmp_path: Path) -> None:
    def spoil(data: bytes, held: Mapping[str, Any], count: int) -> bytes:
        return data + count.to_bytes(4, "little")

    with pytest.raises(ExportError, match="8 builds of the base gave 8 different engines"):
        mapped(base, tmp_path, spoil=spoil)


def test_an_engine_without_its_weights_is_refused(base: Path, tmp_path: Path) -> None:
    def spoil(data: bytes, held: Mapping[str, Any], count: int) -> bytes:
        return bytes(byte ^ 0x55 for byte in data)

    with pytest.raises(ExportError, match=r"none of 13 weights stands in the engine"):
        mapped(base, tmp_path, spoil=spoil)


def test_a_broken_map_and_a_wrong_engine_are_refused(base: Path, tmp_path: Path) -> None:
    places = mapped(base, tmp_path, "F32")
    delta = making.delta(base, Lora(rank=2), patterns=MATRICES)
    model, out = tmp_path / "model.engine", tmp_path / "t.engine"
    wanted = engine(tuned_values(base, delta, tmp_path), "F32")
    stated = f"sha256:{hashlib.sha256(wanted).hexdigest()}"
    [query] = places.places["joined.q"]
    moved = {**places.places, "joined.q": (dataclasses.replace(query, stride=44),)}
    rest = write_rest(places, base, tmp_path / "rest.safetensors")
    broken = dataclasses.replace(places, places=moved)
    with pytest.raises(ProofError):
        patch(model, delta, out, places=broken, base=base, promised=stated)
    copied = {
        **places.places,
        "joined.k": (*places.places["joined.k"], dataclasses.replace(query, begin=0)),
    }
    broken = dataclasses.replace(places, places=copied)
    with pytest.raises(ProofError, match=r"the patched engine is sha256:.*, a build of it is sha"):
        patch(model, delta, out, places=broken, base=rest, promised=stated)
    assert not out.exists()
    data = bytearray(model.read_bytes())
    data[3] ^= 1
    model.write_bytes(data)
    with pytest.raises(CheckpointError, match="its map was made for"):
        patch(model, delta, out, places=places, base=rest, promised=stated)
    assert not out.exists()


def built(base: Path, delta: Any, folder: Path, dtype: str) -> tuple[bytes, str]:
    """A fine-tune's engine as it is built, and its digest."""
    data = engine(tuned_values(base, delta, folder), dtype)
    return data, f"sha256:{hashlib.sha256(data).hexdigest()}"


@pytest.mark.parametrize("shares_blocks", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_an_engine_whose_digest_was_stated_is_written_in_one_pass(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    threads: int,
    shares_blocks: bool,
) -> None:
    """Joined, transposed, split and copied matrices; on file systems that share blocks as well."""

    def cloned(source: int, target: int) -> bool:
        os.pwrite(target, os.pread(source, 1 << 20, 0), 0)
        return True

    if shares_blocks:
        monkeypatch.setattr(promised, "clone", cloned)
    places = mapped(base, tmp_path, dtype)
    delta = making.delta(base, Lora(rank=2), patterns=MATRICES)
    wanted, stated = built(base, delta, tmp_path, dtype)
    out = tmp_path / "t.engine"
    patch(
        tmp_path / "model.engine",
        delta,
        out,
        places=places,
        base=base,
        promised=stated,
        threads=threads,
    )
    assert out.read_bytes() == wanted


def test_no_byte_of_the_base_escapes_the_stated_digest(base: Path, tmp_path: Path) -> None:
    """Each flipped byte of the base's engine is noticed, or it is one that is written anew."""
    places = mapped(base, tmp_path)
    delta = making.delta(base, Lora(rank=2), patterns=MATRICES)
    wanted, stated = built(base, delta, tmp_path, "F16")
    model, out = tmp_path / "model.engine", tmp_path / "t.engine"
    good = model.read_bytes()
    anew = np.zeros(len(good), np.uint8)
    for name in delta.bind_to(places.tensors.values()).targets:
        for place in places.places[name]:
            put_place(anew, place, np.ones(place.nbytes, np.uint8))
    for at in range(0, len(good), 131):
        model.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        if anew[at]:
            patch(model, delta, out, places=places, base=base, promised=stated, threads=1)
            assert out.read_bytes() == wanted
            out.unlink()
            continue
        with pytest.raises(CheckpointError, match="its map was made for"):
            patch(model, delta, out, places=places, base=base, promised=stated, threads=1)
        assert not out.exists()
    assert 0 < anew.sum() < len(good)
    model.write_bytes(good[:-9])
    with pytest.raises(CheckpointError, match="ends before byte"):
        patch(model, delta, out, places=places, base=base, promised=stated)
    assert not out.exists()


def test_a_value_beyond_the_engines_precision_ends_the_pass(base: Path, tmp_path: Path) -> None:
    """The thread that hashes does not wait for what will not come."""
    places = mapped(base, tmp_path)
    delta = making.delta(base, Lora(rank=2), patterns=MATRICES)
    large = {n: np.where(a == a.max(), np.float32(1e6), a) for n, a in values().items()}
    rest = making.write(
        tmp_path / "rest.safetensors",
        {n: ("F32", a.shape, a.astype(np.float32).tobytes()) for n, a in large.items()},
    )
    out = tmp_path / "t.engine"
    with pytest.raises(ExportError, match="holds values beyond F16"):
        patch(
            tmp_path / "model.engine",
            delta,
            out,
            places=places,
            base=rest,
            promised="sha256:" + "0" * 64,
        )
    assert not out.exists()


def test_a_release_for_another_engine_is_refused(base: Path, tmp_path: Path) -> None:
    places = mapped(base, tmp_path)
    delta = making.delta(base, Lora(rank=2), patterns=MATRICES)
    with pytest.raises(ExportError, match="was not released for this device's engine"):
        promised_digest(delta, places.files[0])
    made = {f"engine {places.files[0].sha256}": "sha256:" + "0" * 64}
    stated = dataclasses.replace(delta, manifest=dataclasses.replace(delta.manifest, made=made))
    assert promised_digest(stated, places.files[0]) == "sha256:" + "0" * 64


def test_a_map_of_an_engine_is_read_as_it_was_written(base: Path, tmp_path: Path) -> None:
    places = mapped(base, tmp_path)
    write_map(places, tmp_path / "map.json")
    assert read_map(tmp_path / "map.json") == places


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stride": 1}, "has a stride that is none"),
        ({"stride": 10**6}, "ends beyond model.engine"),
        ({"first": 6}, "does not fit the base's tensor"),
        ({"stride": 0, "first": 1}, "has a stride that is none"),
        ({"through": "F64"}, "does not fit the base's tensor"),
    ],
)
def test_a_hostile_place_is_refused(
    base: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    places = mapped(base, tmp_path)
    [query] = places.places["joined.q"]
    wrong = {**places.places, "joined.q": (dataclasses.replace(query, **change),)}
    write_map(dataclasses.replace(places, places=wrong), tmp_path / "map.json")
    with pytest.raises(FileError, match=words):
        read_map(tmp_path / "map.json")
