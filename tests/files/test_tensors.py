"""Types, roundings between them, raw tensors, and which tensors are tied."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from kilodelta.errors import InputError
from kilodelta.files import dtypes, floats, tying
from kilodelta.files.dtypes import BY_LONG, DTYPES, FLOATS
from kilodelta.files.tensor import RawTensor

torch = pytest.importorskip("torch")


def test_bits_are_the_safetensors_librarys() -> None:
    """Its own names and sizes, by writing one element of each type."""
    theirs = pytest.importorskip("safetensors.torch")
    for name, row in BY_LONG.items():
        one = torch.zeros(1, dtype=getattr(torch, name))
        text = theirs.save({"w": one})
        size = int.from_bytes(text[:8], "little")
        assert f'"dtype":"{row.name}"'.encode() in text[8 : 8 + size]
        assert len(text) - 8 - size == row.bits // 8


def test_names_are_the_libraries_own() -> None:
    onnx = pytest.importorskip("onnx")
    for row in DTYPES.values():
        if row.onnx:
            assert hasattr(onnx.TensorProto, row.onnx), row.onnx
        if row.onnx_number:
            assert onnx.TensorProto.DataType.Value(row.onnx) == row.onnx_number
        if row.storage:
            assert np.dtype(row.storage).itemsize * 8 == row.bits
    trt = pytest.importorskip("tensorrt_rtx")
    for name in dtypes.BY_TENSORRT:
        assert hasattr(trt.DataType, name), name


@pytest.mark.parametrize("name", ["F16", "BF16", "F32", "F64"])
def test_unit_roundoff_is_torchs(name: str) -> None:
    row = FLOATS[name]
    assert row.unit_roundoff == torch.finfo(getattr(torch, row.long)).eps / 2


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_every_16_bit_value_widens_as_torch_says_and_comes_back(name: str) -> None:
    words = np.arange(1 << 16, dtype=np.uint16)
    row = FLOATS[name]
    wide = row.widen(words.view(np.uint8))
    expected = torch.from_numpy(words.view(np.int16).copy()).view(getattr(torch, row.long)).float()
    number = ~np.isnan(wide)
    np.testing.assert_array_equal(number, ~torch.isnan(expected).numpy())
    np.testing.assert_array_equal(
        wide[number].view(np.uint32), expected.numpy()[number].view(np.uint32)
    )
    np.testing.assert_array_equal(row.narrow(wide)[number].view(np.uint16), words[number])
    assert np.isnan(row.widen(row.narrow(wide[~number]))).all()


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_rounding_is_torchs(name: str) -> None:
    row, rng = FLOATS[name], np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 200_000, np.uint32)
    # halfway between two 16-bit values, where ties go to the even one, and at the edges
    edges = (bits & np.uint32(0xFFFF0000)) | np.uint32(0x8000)
    values = np.concatenate([bits, edges, bits & np.uint32(0xFFFFE000) | np.uint32(0x1000)])
    values = values.view(np.float32)
    values = values[~np.isnan(values)]
    expected = torch.from_numpy(values).to(getattr(torch, row.long)).view(torch.int16).numpy()
    np.testing.assert_array_equal(row.narrow(values).view(np.int16), expected)


def test_a_nan_of_ones_stays_nan() -> None:
    """Adding the rounding bias to an all-ones payload wraps around to zero."""
    nan = np.array([0xFFFFFFFF, 0x7FFFFFFF], np.uint32).view(np.float32)
    assert FLOATS["BF16"].narrow(nan).tolist() == [0x7FC0, 0x7FC0]


def test_shapes_are_kept() -> None:
    for name in FLOATS:
        assert FLOATS[name].narrow(np.array(1.5, np.float32)).shape == ()
        assert FLOATS[name].rounded(np.ones((2, 3), np.float32)).shape == (2, 3)
        transposed = np.arange(6, dtype=np.float32).reshape(2, 3).T
        np.testing.assert_array_equal(FLOATS[name].rounded(transposed), transposed)


def test_overflow_is_noticed() -> None:
    values = np.array([1e9, np.inf], "<f4").view(np.uint8)
    cast = floats.cast(values, "F32", "F16")
    assert floats.overflows(values, "F32", cast, "F16")
    inf = values[4:]
    assert not floats.overflows(inf, "F32", floats.cast(inf, "F32", "F16"), "F16")


def test_raw_tensors_are_little_endian_and_in_rows() -> None:
    by_column = np.asfortranarray(np.array([[1, 2], [3, 4]], ">u2"))
    raw = RawTensor.of(by_column)
    assert (raw.dtype, raw.shape) == ("U16", (2, 2))
    assert raw.data.tolist() == [1, 0, 2, 0, 3, 0, 4, 0]
    assert raw.values().tolist() == [[1, 2], [3, 4]]
    assert RawTensor.of(np.array(7)).shape == ()
    assert RawTensor.of(torch.arange(6).reshape(2, 3).t()).values().tolist() == [
        [0, 3],
        [1, 4],
        [2, 5],
    ]


def test_a_view_shares_memory_and_a_copy_does_not() -> None:
    array = np.zeros(3, np.float32)
    view, copy = RawTensor.of(array), RawTensor.copy_of(array)
    array[:] = 1
    assert view.values().tolist() == [1, 1, 1]
    assert copy.values().tolist() == [0, 0, 0]


@pytest.mark.parametrize("value", [np.array(["a"]), np.zeros(2, "O"), np.zeros(2, "M8[s]"), [1], 3])
def test_what_files_cannot_hold_is_refused(value: object) -> None:
    with pytest.raises(InputError) as caught:
        RawTensor.of(value)
    assert caught.value.fix


def test_ties() -> None:
    square = torch.arange(4.0).reshape(2, 2)
    tensors = {
        "b": square,
        "a": square.detach(),
        "turned": square.t(),
        "row": square[0],
        "other": square.clone(),
        "bits": square.view(torch.int32),
        "empty": torch.empty(0),
        "none": torch.empty(0),
        "one": torch.ones(1, 4),
    }
    tensors["again"] = tensors["one"].as_strided((1, 4), (99, 1))  # an axis of length one
    assert tying.first_names(tensors) == {
        **{name: name for name in tensors}, "a": "b", "again": "one"
    }  # fmt: skip
    assert list(tying.untied(tensors)) == [name for name in tensors if name not in {"a", "again"}]
    assert tying.tied(tensors) == {"a", "b", "one", "again"}


def test_ties_without_data() -> None:
    with torch.device("meta"):
        layer = torch.nn.Linear(2, 2)
        other = torch.nn.Linear(2, 2)
    other.weight = layer.weight
    both = torch.nn.ModuleList([layer, other])
    assert tying.tied(both.state_dict()) == {"0.weight", "1.weight"}


def test_the_name_that_files_keep_comes_first() -> None:
    model = SimpleNamespace(_tied_weights_keys=["embed.weight"])
    assert tying.file_order(model, ["embed.weight", "head.weight", "é", "z"]) == [
        "head.weight", "z", "é", "embed.weight"
    ]  # fmt: skip
    assert tying.file_order({}, ["b", "a"]) == ["a", "b"]
