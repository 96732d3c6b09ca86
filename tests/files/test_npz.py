"""`.npz` files: read as numpy reads them, by rows, and every damage a sentence."""

from __future__ import annotations

import io
import os
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kilodelta.errors import InputError
from kilodelta.files.npz import names_and_shapes, read_headers, read_npz

ARRAYS: dict[str, Any] = {
    "ids": np.arange(12, dtype=np.int64).reshape(4, 3),
    "pixels": np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 2, 3),
    "turned": np.asfortranarray(np.arange(20, dtype=np.float64).reshape(4, 5)),
    "foreign": np.arange(4, dtype=">i4"),
    "flag": np.array(True),
    "none": np.zeros((0, 3), np.uint8),
}


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def archive(path: Path, members: dict[str, bytes], **options: Any) -> Path:
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def header(descr: str, shape: str) -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (63 - (len(text) + 10) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text


def test_arrays_are_read_as_numpy_reads_them(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz", **ARRAYS)
    found = read_npz(path)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert np.array_equal(found[name], array), name
        assert found[name].dtype == array.dtype
    compressed = tmp_path / "b.npz"
    np.savez_compressed(compressed, **ARRAYS)
    assert np.array_equal(read_npz(compressed)["turned"], ARRAYS["turned"])


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 9])
def test_the_first_rows(rows: int, tmp_path: Path) -> None:
    found = read_npz(saved(tmp_path / "a.npz", **ARRAYS), rows=rows)
    for name, array in ARRAYS.items():
        assert np.array_equal(found[name], array[:rows] if array.ndim else array), name


def test_headers_cost_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open("x.npy", "w") as one:
        one.write(header("'|u1'", "(50000000,)"))
        for _ in range(50):
            one.write(bytes(1_000_000))
    tracemalloc.start()
    try:
        assert read_headers(path)["x"].shape == (50_000_000,)
        assert read_npz(path, rows=10)["x"].shape == (10,)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_damage_is_a_sentence(tmp_path: Path) -> None:
    good = saved(tmp_path / "good.npz", ids=np.zeros((1, 4), np.int64)).read_bytes()
    one = io.BytesIO()
    np.save(one, np.zeros((1, 4), np.int64))
    cases: dict[str, tuple[bytes, str]] = {
        "cut": (good[:-20], "is not an .npz file"),
        "a checksum": (good.replace(bytes(32), b"\1" + bytes(31)), "is not an .npz file"),
        "no zip": (b"PK\3\4" + bytes(50), "is not an .npz file"),
        "empty": (b"", "is not an .npz file"),
        "one array": (one.getvalue(), "is a .npy file: one array, without the name"),
    }
    for name, (data, expected) in cases.items():
        path = tmp_path / f"{name}.npz"
        path.write_bytes(data)
        with pytest.raises(InputError) as caught:
            read_npz(path)
        assert expected in caught.value.what, name
        assert caught.value.fix
    for position in range(len(good)):  # a flipped byte is noticed, or changes nothing
        flipped = bytearray(good)
        flipped[position] ^= 255
        (tmp_path / "flipped.npz").write_bytes(flipped)
        try:
            found = read_npz(tmp_path / "flipped.npz")
        except InputError:
            continue
        assert [array.tolist() for array in found.values()] == [[[0, 0, 0, 0]]]


def test_what_is_no_plain_array_is_refused_by_name(tmp_path: Path) -> None:
    lying = header("'<i8'", "(1000000000000,)")
    short = header("'<i8'", "(3,)") + bytes(16)
    objects = saved(tmp_path / "o.npz", things=np.array([{}], dtype=object))
    texts = saved(tmp_path / "t.npz", words=np.array(["a"]))
    cases = [
        (archive(tmp_path / "huge.npz", {"x.npy": lying}), "states 8000000000"),
        (archive(tmp_path / "short.npz", {"x.npy": short}), "states"),
        (archive(tmp_path / "text.npz", {"x.txt": b"a"}), "holds 'x.txt', which is no array"),
        (archive(tmp_path / "none.npz", {}), "holds no arrays"),
        (objects, "things is an array of object"),
        (texts, "words is an array of <U1"),
        (tmp_path, "is not a regular file"),
        (tmp_path / "absent.npz", "does not exist"),
    ]
    for path, expected in cases:
        with pytest.raises(InputError) as caught:
            read_npz(path)
        assert expected in caught.value.what, path


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(InputError, match="not a regular file"):
        read_headers(tmp_path / "pipe.npz")


def test_a_list_for_a_sentence(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz", ids=ARRAYS["ids"], flag=ARRAYS["flag"])
    assert names_and_shapes(read_headers(path)) == "ids int64 (4, 3), flag bool ()"
