"""The `.kd` file: round trips, sizes, and every kind of damage and malice."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kilodelta
from kilodelta.errors import BaseMismatchError, FileError, InputError
from kilodelta.exact.bounds import exactness
from kilodelta.files import canonical
from kilodelta.files.tensor import RawTensor
from kilodelta.format.delta import Delta
from kilodelta.format.methods import Lora, Method, Nola, RandLora, UniLora
from kilodelta.format.targets import Patterns
from tests.support.making import METHODS, delta, forge, ids, model, reforged, write


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("base") / "base.safetensors", model())


@pytest.fixture(scope="module")
def small(base: Path) -> Delta:
    return delta(
        base, Nola(rank=1, bases=3), extras={"norm.bias": RawTensor.copy_of(np.ones(9, np.float32))}
    )


def error_of(path: Path, base: Path | None = None) -> str:
    with pytest.raises(FileError) as caught:
        kilodelta.load(path, base=base)
    assert caught.value.fix
    return caught.value.what


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_what_is_read_is_what_was_written(
    method: Method, bits: int, base: Path, tmp_path: Path
) -> None:
    extras = {
        "norm.bias": RawTensor.copy_of(np.arange(9, dtype=np.float32)),
        "new": RawTensor.copy_of(np.array(3)),
    }
    made = delta(base, method, bits=bits, extras=extras)
    size = made.save(tmp_path / "task.kd")
    found = kilodelta.load(tmp_path / "task.kd", base=base)
    assert size == (tmp_path / "task.kd").stat().st_size
    assert found.manifest == made.manifest
    assert found.layout == made.layout
    assert np.array_equal(found.blob, made.blob)
    assert {n: t.data.tobytes() for n, t in found.extras.items()} == {
        n: t.data.tobytes() for n, t in extras.items()
    }


def test_every_flipped_bit_is_noticed_without_a_base(small: Delta, tmp_path: Path) -> None:
    path = tmp_path / "task.kd"
    small.save(path)
    data = bytearray(path.read_bytes())
    for position in range(len(data)):
        for bit in range(8):
            data[position] ^= 1 << bit
            path.write_bytes(data)
            with pytest.raises(FileError):
                kilodelta.load(path)
            data[position] ^= 1 << bit
    path.write_bytes(data)
    kilodelta.load(path)


def test_a_cut_or_longer_file_is_refused(small: Delta, tmp_path: Path) -> None:
    path = tmp_path / "task.kd"
    small.save(path)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(FileError):
            kilodelta.load(path)
    path.write_bytes(data + b"\0")
    assert "the tensors end at byte" in error_of(path)


@pytest.mark.parametrize("layers", [1, 36, 256, 1000])
@pytest.mark.parametrize(
    "method", [Nola(rank=2, bases=64), Lora(rank=1), UniLora(bases=2000)], ids=ids
)
def test_the_size_rule(method: Method, layers: int, tmp_path: Path) -> None:
    """At most 1.1 x coefficients + extras + 4 KiB, also with a thousand targets."""
    weights = np.zeros((16, 16), np.float16).tobytes()
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(layers)]
    base = write(tmp_path / "base.safetensors", {n: ("F16", (16, 16), weights) for n in names})
    made = delta(base, method, patterns=Patterns(include=("model.layers.*.weight",)))
    assert made.save(tmp_path / "task.kd") <= 1.1 * made.blob.size + 4096


def test_every_safetensors_reader_opens_the_file(small: Delta, tmp_path: Path) -> None:
    from safetensors import safe_open

    small.save(tmp_path / "task.kd")
    with safe_open(tmp_path / "task.kd", framework="pt") as file:
        assert sorted(file.keys()) == ["coefficients", "extra.norm.bias"]
        assert file.get_tensor("extra.norm.bias").tolist() == [1.0] * 9
        assert json.loads(file.metadata()["kilodelta"])["version"] == 1


def put(*path: str | int, value: Any) -> Callable[[Any], None]:
    """Set a field of the manifest."""

    def change(table: Any) -> None:
        for key in path[:-1]:
            table = table[key]
        table[path[-1]] = value

    return change


def drop(*path: str) -> Callable[[Any], None]:
    """Remove a field of the manifest."""

    def change(table: Any) -> None:
        for key in path[:-1]:
            table = table[key]
        del table[path[-1]]

    return change


WRONG_MANIFESTS: list[tuple[Callable[[Any], None], str]] = [
    (put("version", value=2), "has version 2; this kilodelta reads 1"),
    (put("version", value=True), "has version True"),
    (put("surprise", value=1), "unknown key 'surprise'"),
    (drop("seed"), "lacks 'seed'"),
    (put("base", "extra", value=1), "base has an unknown key"),
    (put("base", "root", value="sha256:00"), "base.root is not sha256"),
    (put("base", "tensors", value=-1), "base.tensors is -1"),
    (put("base", "tensors", value=3), "base.fingerprints has"),
    (put("base", "fingerprints", value="!"), "base.fingerprints is not base64"),
    (put("base", "name", value="x" * 2000), "base.name is not a text"),
    (put("method", "name", value="dora"), "method 'dora' is unknown"),
    (put("method", value="nola"), "method 'nola' is unknown"),
    (put("method", "name", value=["nola"]), "method ['nola'] is unknown"),
    (put("method", "name", value={"nola": 1}), "is unknown"),
    (put("method", "name", value=None), "method None is unknown"),
    (put("method", "rank", value=10**200), "method.rank is a number of 665 bits"),
    (put("method", "basis", value=["sign"]), "method.basis is ['sign']"),
    (put("seed", value=["1"]), "seed is not a 64-bit integer"),
    (put("base", "root", value=["sha256:"]), "base.root is not sha256"),
    (put("base", "tensors", value=10**4000), "a number has 4001 digits"),
    (put("targets", "include", value=[["*"]]), "targets.include is not a text"),
    (put("coefficients", "bits", value=[8]), "coefficients.bits is [8]"),
    (put("coefficients", "scales", value=[1]), "coefficients.scales is not base64"),
    (put("extras", value=[["norm.bias"]]), "extras is not a list of names"),
    (put("method", "rank", value=0), "method.rank is 0"),
    (put("method", "rank", value=10**12), "method.rank is 1000000000000"),
    (put("method", "rank", value=1.0), "method.rank is 1.0"),
    (put("method", "bases", value=10**12), "method.bases is 1000000000000"),
    (put("method", "bases", value=4), "bytes of coefficients, not"),
    (put("method", "basis", value="gauss"), "method.basis is 'gauss'"),
    (put("method", "basis", value="ternary"), "method.basis is 'ternary'"),
    (put("method", "alpha", value=1), "method has an unknown key 'alpha'"),
    (put("seed", value="-1"), "seed is not a 64-bit integer"),
    (put("seed", value=str(2**64)), "seed is not a 64-bit integer"),
    (put("seed", value="01"), "seed is not a 64-bit integer"),
    (put("seed", value=5), "seed is not a 64-bit integer"),
    (put("targets", "count", value=10**9), "targets.count is 1000000000"),
    (put("targets", "count", value=4), "scales, but its targets need"),
    (put("targets", "include", value="*"), "targets.include is not a list"),
    (put("targets", "include", value=["*"] * 300), "targets.include is not a list"),
    (put("coefficients", "bits", value=5), "coefficients.bits is 5"),
    (put("coefficients", "bits", value=4), "bytes of coefficients, not"),
    (put("coefficients", "scales", value="AA=="), "not pairs"),
    (put("coefficients", "scales", value="AAAA" * 7), "not pairs"),
    (put("coefficients", "scales", value=""), "has 0 scales"),
    (put("extras", value=[]), "disagree about extra 'norm.bias'"),
    (put("extras", value=["norm.bias", "norm.bias"]), "not in name order"),
    (put("extras", value=["norm.bias", "ghost"]), "not in name order"),
    (put("extras", value=["ghost", "norm.bias"]), "disagree about extra 'ghost'"),
    (put("result", "root", value="md5:0"), "result.root is not sha256"),
    (put("made", value=[]), "made is not an object"),
    (put("made", "deep", value={}), "made.deep is not a text"),
]


@pytest.mark.parametrize(
    ("change", "expected"), WRONG_MANIFESTS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_a_wrong_manifest_is_refused_by_name(
    change: Callable[[Any], None], expected: str, small: Delta, tmp_path: Path
) -> None:
    assert expected in error_of(reforged(tmp_path / "task.kd", small, change))


def test_bits_that_a_method_does_not_take_are_refused(base: Path, tmp_path: Path) -> None:
    """RandLoRA's coefficients fold into int8 factors."""
    made = delta(base, RandLora(rank=3))
    path = reforged(tmp_path / "task.kd", made, put("coefficients", "bits", value=16))
    assert "randlora takes coefficients of 4 or 8 bits, not 16" in error_of(path)


def test_a_reforged_but_unchanged_file_is_read(small: Delta, tmp_path: Path) -> None:
    """So that the tests above fail for their own reason."""
    found = kilodelta.load(reforged(tmp_path / "task.kd", small, lambda table: None))
    assert found.manifest == small.manifest


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not JSON"),
        ("[]", "not an object"),
        ('{"a":NaN}', "NaN is not JSON"),
        ('{"a":1,"a":2}', "a key stands twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":"\\ud800"}', "surrogates not allowed"),
        ('{"a":' + "9" * 5000 + "}", "not JSON"),
        ('{"version": 1}', "unknown key"),
    ],
)
def test_a_manifest_that_is_no_manifest(
    text: str, expected: str, small: Delta, tmp_path: Path
) -> None:
    tensors = {"coefficients": ("U8", (1,), b"\0")}
    path = forge(tmp_path / "task.kd", tensors, text)
    what = error_of(path)
    assert expected in what or "lacks" in what


def test_a_manifest_in_another_spelling_is_refused(small: Delta, tmp_path: Path) -> None:
    spaced = json.dumps(json.loads(small.manifest.text()), indent=1, sort_keys=True)
    tensors = {
        "coefficients": ("U8", (small.blob.size,), small.blob.tobytes()),
        "extra.norm.bias": ("F32", (9,), small.extras["norm.bias"].data.tobytes()),
    }
    assert "canonical form" in error_of(forge(tmp_path / "task.kd", tensors, spaced))


def test_other_tensors_and_metadata_are_refused(small: Delta, tmp_path: Path) -> None:
    text = small.manifest.text()
    tensors = {
        "coefficients": ("U8", (small.blob.size,), small.blob.tobytes()),
        "extra.norm.bias": ("F32", (9,), small.extras["norm.bias"].data.tobytes()),
    }
    path = tmp_path / "task.kd"
    more = {**tensors, "hidden": ("U8", (1,), b"\0")}
    assert "unknown tensor 'hidden'" in error_of(forge(path, more, text))
    assert "metadata" in error_of(forge(path, tensors, text, author="me"))
    wide = {**tensors, "coefficients": ("F32", (1,), b"\0\0\0\0")}
    assert "U8 tensor 'coefficients'" in error_of(forge(path, wide, text))
    assert "U8 tensor" in error_of(
        forge(path, {"extra.norm.bias": tensors["extra.norm.bias"]}, text)
    )


def header(text: str, data: bytes = b"") -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return len(raw).to_bytes(8, "little") + raw + data


META = '"__metadata__":{"kilodelta":"{}","kilodelta.digest":"x"}'


def entry(name: str = "a", dtype: str = "U8", shape: str = "[1]", offsets: str = "[0,1]") -> str:
    """One tensor of a header, as text that may be wrong."""
    return f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


def one(data: bytes = b"1", **fields: str) -> bytes:
    """A file with one tensor."""
    return header("{" + entry(**fields) + "}", data)


BROKEN = [
    (b"", "too few for a safetensors header"),
    (b"\0" * 7, "too few for a safetensors header"),
    ((2**63).to_bytes(8, "little") + b"x" * 100, "the header claims"),
    ((1 << 20 | 8).to_bytes(8, "little") + b"x" * 100, "at most 1048576 are allowed"),
    ((500).to_bytes(8, "little") + b"{}", "but the file has 10 in all"),
    (header("[]"), "not a JSON object"),
    (header("{" * 50000), "not valid JSON"),
    (header('{"a":1,"a":1}'), "a key stands twice"),
    (header('{"__metadata__":{"a":1}}'), "not an object of strings"),
    (
        header('{"a":{"dtype":"U8","shape":[1]}}', b"1"),
        "does not have dtype, shape",
    ),
    (one(dtype="Q8"), "unknown dtype 'Q8'"),
    (one(shape="[-1]"), "impossible shape"),
    (one(shape="[true]"), "impossible shape"),
    (one(offsets="[-1,0]"), "impossible offsets"),
    (one(offsets="[1,0]"), "takes 1 bytes"),
    (one(dtype="F32", shape="[4611686018427387904]"), "takes 18446744073709551616 bytes"),
    (one(b"12", offsets="[1,2]"), "leaves a gap"),
    (
        header("{" + entry() + "," + entry("b", shape="[2]", offsets="[0,2]") + "}", b"123"),
        "overlaps",
    ),
    (one(b"12"), "the tensors end at byte"),
    (one(name="a\\u0000"), "NUL"),
    (one(name="\\ud800"), "not valid JSON"),
    (one(), "metadata has not exactly"),
    (header("{" + META + "," + entry() + "}", b"1"), "not in canonical form"),
]


@pytest.mark.parametrize(("data", "expected"), BROKEN, ids=[text for _, text in BROKEN])
def test_a_broken_container_is_refused(data: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "task.kd"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        assert expected in error_of(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_small_file_cannot_ask_for_large_memory(tmp_path: Path) -> None:
    """NOLA's rank and bases cost no bytes; the base's own sides limit them."""
    weights = np.zeros((4, 4), np.float32).tobytes()
    base = write(tmp_path / "base.safetensors", {"w": ("F32", (4, 4), weights)})
    made = delta(base, Nola(rank=2, bases=3), patterns=Patterns(include=("w",)))
    path = reforged(tmp_path / "task.kd", made, put("method", "rank", value=4096))
    assert "rank 4096 is larger than both sides of w" in error_of(path, base)


def test_places_that_are_no_files(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    os.mkfifo(tmp_path / "pipe")
    assert "is a folder" in error_of(tmp_path)
    assert "is a device" in error_of(Path("/dev/zero"))
    assert "is a pipe" in error_of(tmp_path / "pipe")
    assert "symbolic links" in error_of(loop)
    assert "No such file" in error_of(tmp_path / "absent")


def test_a_forbidden_coefficient_is_refused(base: Path, small: Delta, tmp_path: Path) -> None:
    from dataclasses import replace

    blob = small.blob.copy()
    blob[0] = 0x80
    replace(small, blob=blob).save(tmp_path / "task.kd")
    assert "outside the symmetric 8-bit range" in error_of(tmp_path / "task.kd", base)


def test_a_delta_for_another_architecture_is_refused(small: Delta, tmp_path: Path) -> None:
    other = model()
    del other["tall.weight"]
    path = write(tmp_path / "other.safetensors", other)
    with pytest.raises(BaseMismatchError, match="match 4 tensors of this model, not 5"):
        small.bind(path)


def test_an_extra_that_is_a_target_is_refused(base: Path) -> None:
    with pytest.raises(FileError, match=r"tall.weight is a target and an extra as well"):
        delta(
            base, Lora(rank=1), extras={"tall.weight": RawTensor.copy_of(np.zeros(3, np.float32))}
        )


@pytest.mark.parametrize(
    ("bound", "e", "expected"),
    [
        (0, -999, ""),
        (1, -126, ""),
        (1, -127, "2^-126 is the smallest normal"),
        (2**53 - 1, 0, ""),
        (2**53, 0, "2^53 is the limit"),
        (2**26, 100, ""),
        (2**27, 100, "float32 ends at 2^128"),
        (1, 2000, "float32 ends at 2^128"),
    ],
)
def test_exactness(bound: int, e: int, expected: str) -> None:
    assert expected in exactness(bound, e)
    assert bool(expected) == bool(exactness(bound, e))


def test_a_writer_takes_smaller_scales_before_it_refuses() -> None:
    from kilodelta.merging.build import quantise_target, update_problem

    rng = np.random.default_rng(0)
    method = Nola(rank=8, bases=1024)
    floats = {"alpha": rng.normal(size=1024), "beta": rng.normal(size=1024)}
    groups = quantise_target(method, floats, 16)
    assert not update_problem(method, groups)
    assert max(group.scale.c for group in groups.values()) < 128
    huge = Nola(rank=4096, bases=2048)
    with pytest.raises(InputError, match="cannot be exact"):
        quantise_target(huge, {"alpha": np.ones(2048), "beta": np.ones(2048)}, 16)


def test_the_header_limit_is_kept_by_the_writer(base: Path, tmp_path: Path) -> None:
    names = {
        f"{'n' * 500}{i}": RawTensor(dtype="U8", shape=(0,), data=np.empty(0, np.uint8))
        for i in range(1500)
    }
    with pytest.raises(InputError, match="the format allows 1048576"):
        delta(base, Lora(rank=1), extras=names).save(tmp_path / "task.kd")
    assert not (tmp_path / "task.kd").exists()


def test_canonical_json() -> None:
    assert canonical.dumps({"b": [1, 2.5], "a": "é"}) == '{"a":"é","b":[1,2.5]}'
