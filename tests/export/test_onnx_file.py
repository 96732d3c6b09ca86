"""Finding tensors in ONNX files by byte offsets: the `onnx` package is the oracle."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("onnx")

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from kilodelta.errors import CheckpointError
from kilodelta.export.onnx.file import read_onnx, scan
from kilodelta.export.onnx.protobuf import WireError, varint
from kilodelta.export.onnx.tensors import is_inside
from kilodelta.files.copying import pread
from kilodelta.files.floats import cast, overflows, transposed
from tests.support import making, onnx_files

FLOATS = np.arange(6, dtype=np.float32).reshape(2, 3)


def branch(name: str) -> Any:
    """A subgraph with an initializer of its own."""
    info = helper.make_tensor_value_info(f"{name}:out", TensorProto.FLOAT, [2, 3])
    node = helper.make_node("Identity", [name], [f"{name}:out"])
    return helper.make_graph([node], name, [], [info], [numpy_helper.from_array(FLOATS, name)])


def everything() -> Any:
    """A model with tensors in every place and spelling."""
    kinds = [np.float32, np.float16, np.float64, np.int64, np.int32, np.int8, np.uint8, np.bool_]
    weights = [numpy_helper.from_array(FLOATS.astype(k), f"raw.{np.dtype(k)}") for k in kinds]
    weights += [
        helper.make_tensor("typed.float", TensorProto.FLOAT, [2, 3], FLOATS.ravel()),
        helper.make_tensor("typed.double", TensorProto.DOUBLE, [2, 3], FLOATS.ravel()),
        helper.make_tensor("typed.half", TensorProto.FLOAT16, [2, 3], FLOATS.ravel()),
        helper.make_tensor("typed.int", TensorProto.INT64, [2], [7, 8]),
        helper.make_tensor("text", TensorProto.STRING, [1], [b"x"]),
        numpy_helper.from_array(np.zeros((0, 4), np.float32), "empty"),
        numpy_helper.from_array(np.float32(3.5).reshape(()), "scalar"),
    ]
    constant = numpy_helper.from_array(FLOATS + 1, "inner name")
    nodes = [
        helper.make_node("Constant", [], ["constant"], value=constant),
        helper.make_node(
            "If", ["raw.bool"], ["if"], then_branch=branch("then"), else_branch=branch("else")
        ),
        *(helper.make_node("Shape", [tensor.name], [f"{tensor.name}:s"]) for tensor in weights),
    ]
    graph = helper.make_graph(nodes, "g", [], [], weights)
    inner = helper.make_node("Constant", [], ["in function"], value=constant)
    opset = helper.make_opsetid("", 18)
    function = helper.make_function("d", "f", [], ["in function"], [inner], [opset])
    return helper.make_model(graph, functions=[function], opset_imports=[opset])


def test_every_tensor_is_found_where_onnx_finds_it(tmp_path: Path) -> None:
    model = everything()
    path = onnx_files.write(tmp_path / "m.onnx", model)
    found = read_onnx(path)
    sealed = {"typed.half", "typed.int", "text"}
    assert set(found.sealed) == sealed
    stored = {tensor.name: tensor for tensor in found.tensors}
    for tensor in model.graph.initializer:
        if tensor.name in sealed:
            continue
        place, wanted = stored[tensor.name], numpy_helper.to_array(tensor)
        assert place.top, tensor.name
        assert place.shape == wanted.shape
        assert pread(path, place.begin, place.nbytes).tobytes() == wanted.tobytes(), tensor.name
    for name in ("constant", "in function"):
        place = stored[name]
        assert not place.top
        assert pread(path, place.begin, place.nbytes).tobytes() == (FLOATS + 1).tobytes()
    assert not stored["then"].top
    assert not stored["else"].top
    assert {"raw.bool", "then", "else", "scalar"} <= found.used
    assert "constant" not in found.used


def test_external_data_are_found_in_their_own_file(tmp_path: Path) -> None:
    tensors = making.model()
    path = onnx_files.write(tmp_path / "m.onnx", onnx_files.model(tensors), external=True)
    found = read_onnx(path)
    assert {tensor.name for tensor in found.tensors} == set(tensors)
    for tensor in found.tensors:
        assert (tensor.dtype, tensor.shape) == tensors[tensor.name][:2]
        data = pread(tmp_path / tensor.file, tensor.begin, tensor.nbytes)
        assert (tensor.file, data.tobytes()) == ("m.onnx.data", tensors[tensor.name][2])


@given(cut=st.integers(0, 3000), flip=st.integers(0, 3000), bit=st.integers(0, 7))
def test_damage_is_an_error_or_goes_unseen_but_never_a_crash(cut: int, flip: int, bit: int) -> None:
    data = bytearray(EVERYTHING[: max(0, len(EVERYTHING) - cut)])
    if flip < len(data):
        data[flip] ^= 1 << bit
    try:
        found = scan(bytes(data), "m.onnx")
    except WireError:
        return
    for tensor in found.tensors:
        assert tensor.begin + tensor.nbytes <= len(data) or tensor.file != "m.onnx"


EVERYTHING = everything().SerializeToString()


@given(st.binary(max_size=200))
def test_any_bytes_are_an_error_or_a_model(data: bytes) -> None:
    with contextlib.suppress(WireError):
        scan(data, "m.onnx")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "holds no graph"),
        (b"\x08\x07", "holds no graph"),
        (b"\x02\x01\x00", "field number 0"),
        (b"\x3b\x00", "wire type 3"),
        (b"\x3a\x05\x00", "5 bytes announced, 1 are there"),
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "a number without an end"),
        (b"\x3a\x80", "a number without an end"),
        # graph.initializer[0].dims = 2^64 - 1
        (
            b"\x3a\x0f\x2a\x0d\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x10\x01",
            "impossible shape",
        ),
        # graph.node[0].input[0] is not UTF-8
        (b"\x3a\x05\x0a\x03\x0a\x01\xff", "not UTF-8"),
    ],
)
def test_hostile_bytes_are_refused(data: bytes, what: str) -> None:
    with pytest.raises(WireError, match=what):
        scan(data, "m.onnx")


def test_numbers_are_those_of_the_specification() -> None:
    assert varint(b"\x96\x01", 0, 2) == (150, 2)
    assert varint(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", 0, 10) == (2**64 - 1, 10)


@pytest.mark.parametrize(
    "place", ["../x", "/etc/passwd", "a/../../x", "", ".", "c:x", "a\\b", "a\nb"]
)
def test_external_data_stay_in_the_models_folder(tmp_path: Path, place: str) -> None:
    assert not is_inside(place)
    model = onnx_files.model({"w": ("F32", (2, 3), FLOATS.tobytes())})
    path = onnx_files.write(tmp_path / "m.onnx", model, external=True)
    path.write_bytes(moved(path, "location", place))
    with pytest.raises(CheckpointError, match="lie outside the model's folder"):
        read_onnx(path)


def moved(path: Path, key: str, value: str) -> bytes:
    """A model's bytes with an entry of its first tensor's external data changed."""
    model = onnx.load(str(path), load_external_data=False)
    [entry] = [e for e in model.graph.initializer[0].external_data if e.key == key]
    entry.value = value
    found: bytes = model.SerializeToString()
    return found


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("location", "other.data", "other.data, which is not there"),
        ("offset", "-1", "no offset or length"),
        ("offset", "99999", "end at byte 100023 of m.onnx.data, which has 24"),
        ("length", "23", "have 23 bytes, not 24"),
        ("length", "9" * 30, "no offset or length"),
    ],
)
def test_external_data_that_do_not_fit_are_refused(
    tmp_path: Path, key: str, value: str, what: str
) -> None:
    model = onnx_files.model({"w": ("F32", (2, 3), FLOATS.tobytes())})
    path = onnx_files.write(tmp_path / "m.onnx", model, external=True)
    path.write_bytes(moved(path, key, value))
    with pytest.raises(CheckpointError, match=what) as caught:
        read_onnx(path)
    assert caught.value.fix


def test_casts_are_torchs_on_every_kind_of_number() -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, size=20_000, dtype=np.uint32)
    bits[:6] = [0x7FC00000, 0x7F800000, 0xFF800000, 0, 0x80000000, 0x7F800001]
    wide = torch.from_numpy(bits.view(np.float32))
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for source, kind in kinds.items():
        values = wide.to(kind)
        data = values.view(torch.uint8).numpy()
        for target, wanted in kinds.items():
            got = torch.from_numpy(cast(data, source, target)).view(wanted)
            expected = values.float().to(wanted)
            assert torch.equal(got.nan_to_num(nan=1.5), expected.nan_to_num(nan=1.5))
            lost = bool((expected.isinf() & ~values.isinf()).any())
            assert overflows(data, source, cast(data, source, target), target) == lost


def test_turning_a_matrix_is_transposing_it() -> None:
    for width in (1, 2, 4, 8):
        values = np.arange(12, dtype=f"u{width}").reshape(3, 4)
        data = values.reshape(-1).view(np.uint8)
        assert transposed(data, (3, 4)).tobytes() == np.ascontiguousarray(values.T).tobytes()
        assert transposed(data, (3, 2, 2)) is data


def test_a_file_that_is_cut_while_it_is_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages of a memory map beyond the end would kill the process by SIGBUS."""
    path = onnx_files.write(tmp_path / "m.onnx", everything())

    def cut(data: Any, main: str) -> Any:
        with path.open("rb+") as file:
            file.truncate(64)
        return scan(data, main)

    monkeypatch.setattr("kilodelta.export.onnx.file.scan", cut)
    with pytest.raises(CheckpointError, match=r"ends at byte 64 of .* it was cut"):
        read_onnx(path)


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").touch()
    with pytest.raises(CheckpointError, match=r"m\.onnx: it is empty"):
        read_onnx(tmp_path / "m.onnx")
