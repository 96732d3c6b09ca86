"""The container, beside the safetensors library: read what it reads, or refuse it by name."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kilodelta.errors import CheckpointError
from kilodelta.files import safetensors as ours
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.dtypes import DTYPES
from kilodelta.files.source import SourceFile
from kilodelta.files.tensor import RawTensor, TensorInfo

theirs = pytest.importorskip("safetensors")
KEPT = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def packed(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def by_library(file: bytes) -> dict[str, Any] | None:
    """name to (dtype, shape, bytes), or None where the library refuses the file."""
    try:
        return {
            name: (found["dtype"], tuple(found["shape"]), bytes(found["data"]))
            for name, found in theirs.deserialize(file)
        }
    except theirs.SafetensorError:
        return None


def by_us(path: Path) -> dict[str, Any]:
    checkpoint = Checkpoint.open(path)
    return {
        name: (raw.dtype, raw.shape, raw.data.tobytes())
        for name, raw in ((name, checkpoint.raw(name)) for name in checkpoint.names)
    }


names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8).filter(
    lambda name: name != "__metadata__"
)
shapes = st.lists(st.integers(0, 4), max_size=3)
# What may stand in a tensor's entry or beside it without meaning anything.
inert = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text("aé", max_size=2),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab"), inner, max_size=2),
    max_leaves=4,
)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A sound file: any types, shapes, order of the header, spaces, unknown fields, metadata."""
    table: dict[str, Any] = {}
    position = 0
    for name in draw(st.lists(names, max_size=5, unique=True)):
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        shape = draw(shapes)
        bits = DTYPES[dtype].bits * int(np.prod(shape, dtype=int))
        end = position + bits // 8  # for F4 and F6 not always whole: then both must refuse
        fields: dict[str, Any] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        if draw(st.booleans()):
            fields |= draw(st.dictionaries(st.sampled_from(["note", "", "x"]), inert, max_size=2))
        table[name] = fields
        position = end
    order = draw(st.permutations(sorted(table)))
    table = {name: table[name] for name in order}
    metadata = draw(
        st.none() | st.just(None) | st.dictionaries(st.text(max_size=3), st.text(max_size=3))
    )
    if metadata is not None or draw(st.booleans()):
        table["__metadata__"] = metadata
    text = json.dumps(table, ensure_ascii=draw(st.booleans()))
    text += " " * draw(st.integers(0, 9))
    data = draw(st.binary(min_size=position, max_size=position))
    return packed(text.encode("utf-8", "surrogatepass"), data)


@KEPT
@given(file=files())
def test_what_the_library_reads_is_read_alike(file: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(file)
    expected = by_library(file)
    if expected is None:
        with pytest.raises(CheckpointError, match="safetensors"):
            by_us(path)
    else:
        assert by_us(path) == expected


# What stands in for a field: values of every kind, in range and out of it.
odd = st.one_of(
    inert,
    st.floats(allow_nan=False),
    st.sampled_from([-1, 2**53, 2**63 - 1, 2**63, 2**64, 10**400, 1e0, "F32", "U8", "Q8", [[]]]),
    st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, -1, 2**32, 2**62, True, None, 1.0]), max_size=4),
)


@st.composite
def broken(draw: st.DrawFn) -> bytes:
    """A file with a field, a key, a byte, or the length of the header changed."""
    table: dict[str, Any] = {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "U8", "shape": [4, 1], "data_offsets": [8, 12]},
        "__metadata__": {"format": "pt"},
    }
    place = draw(st.sampled_from(["a", "b", "__metadata__", "new"]))
    how = draw(st.sampled_from(["field", "whole", "drop", "text", "data"]))
    if how == "field":
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "format", "more"]))
        table[place] = {**table.get(place, {}), key: draw(odd)}
    elif how == "whole":
        table[place] = draw(odd)
    elif how == "drop":
        table.pop(place, None)
    text = json.dumps(table).encode()
    if how == "text":
        at = draw(st.integers(0, len(text) - 1))
        text = text[:at] + draw(st.binary(max_size=3)) + text[at + draw(st.integers(0, 3)) :]
    data = bytes(range(12))
    if how == "data":
        data = data[: draw(st.integers(0, 12))] + bytes(draw(st.integers(0, 3)))
    file = packed(text, data)
    return (
        file[: draw(st.integers(0, len(file)))] if draw(st.booleans()) and how == "data" else file
    )


@KEPT
@given(file=broken())
def test_a_broken_file_is_refused_or_read_alike(file: bytes, tmp_path: Path) -> None:
    """Never another reading, never another exception. We may refuse more than the library does:
    repeated keys, NUL in names, numbers that no float holds."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(file)
    expected = by_library(file)
    with contextlib.suppress(CheckpointError):
        assert by_us(path) == expected


@KEPT
@given(
    tensors=st.dictionaries(
        names,
        st.builds(
            lambda dtype, shape, seed: RawTensor(
                dtype=dtype,
                shape=tuple(shape),
                data=np.random.default_rng(seed).integers(
                    0, 256, TensorInfo(name="", dtype=dtype, shape=tuple(shape)).nbytes, np.uint8
                ),
            ),
            st.sampled_from([name for name, row in DTYPES.items() if row.bits >= 8]),
            shapes,
            st.integers(0, 9),
        ),
        max_size=5,
    ),
    metadata=st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2),
)
def test_what_we_write_the_library_reads(
    tensors: dict[str, RawTensor], metadata: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "m.safetensors"
    size = ours.write(path, tensors, metadata)
    file = path.read_bytes()
    assert len(file) == size
    expected = {name: (t.dtype, t.shape, t.data.tobytes()) for name, t in tensors.items()}
    assert by_library(file) == expected == by_us(path)
    assert ours.read_layout(SourceFile(path)).metadata == metadata
    again = tmp_path / "n.safetensors"
    order = ours.wide_first(tensor.info(name) for name, tensor in tensors.items())
    assert (
        ours.write_stream(again, order, (tensors[i.name].data.data for i in order), metadata)
        == size
    )
    assert again.read_bytes() == file


ENTRY = '"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]%s}'


@pytest.mark.parametrize(
    "header",
    [
        "{" + ENTRY % "" + ',"__metadata__":null}',
        "{" + ENTRY % ',"note":"x","deep":[{"a":[1]}]' + "}",
        "  {" + ENTRY % "" + "}\n ",
        '{"__metadata__":{"a":"b"},' + ENTRY % "" + "}",
    ],
)
def test_odd_and_sound_headers(header: str, tmp_path: Path) -> None:
    """Literal spellings that other tools write and the library reads."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(packed(header.encode(), b"\7"))
    assert by_us(path) == by_library(path.read_bytes()) == {"a": ("U8", (1,), b"\7")}


@pytest.mark.parametrize(
    ("header", "what"),
    [
        ('{"__metadata__":{"a":null},' + ENTRY % "" + "}", "not an object of strings"),
        ('{"__metadata__":[],' + ENTRY % "" + "}", "not an object of strings"),
        ("{" + ENTRY % "" + "," + ENTRY % "" + "}", "stands twice"),
        ('{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}', "ends within a byte"),
        ('{"a":{"dtype":"U8","shape":[1]}}', "does not have dtype, shape and data_offsets"),
        ('{"a":{"dtype":"U8","shape":[1],"data_offsets":[-0,1]}}', "impossible offsets"),
        ("{" + ENTRY % (',"deep":' + "[" * 5000 + "]" * 5000) + "}", "nested too deeply"),
        ("{" + ENTRY % (',"n":' + "1" * 5000) + "}", "a number has 5000 digits"),
    ],
)
def test_headers_that_are_refused(header: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(packed(header.encode(), b"\7"))
    with pytest.raises(CheckpointError, match=what):
        by_us(path)


def test_a_stream_of_the_wrong_size_leaves_nothing(tmp_path: Path) -> None:
    info = TensorInfo(name="w", dtype="F32", shape=(2,))
    with pytest.raises(ValueError, match="came with 7 bytes"):
        ours.write_stream(tmp_path / "m.safetensors", [info], [bytes(7)])
    assert list(tmp_path.iterdir()) == []
