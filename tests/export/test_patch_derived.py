"""Patch mode and weights that a file holds twice, once in another form: refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")

import onnx
from onnx import TensorProto, helper

from kilodelta.errors import ExportError
from kilodelta.export.patching.make_map import make_map
from kilodelta.export.patching.rewrite import patch
from kilodelta.format.methods import Lora
from kilodelta.format.targets import Patterns
from tests.support import making, onnx_files

ROWS, COLUMNS = 96, 64
RNG = np.random.default_rng(7)
TABLE = RNG.normal(size=(ROWS, COLUMNS)).astype(np.float32)
OTHER = RNG.normal(size=(ROWS, COLUMNS)).astype(np.float32)
PATTERNS = Patterns(include=("embed.weight",))


def quantised(values: Any, bits: int = 8, axis: int | None = None, zero: int = 0) -> Any:
    """Symmetric codes, with one scale or one per line along an axis."""
    top = (1 << (bits - 1)) - 1
    scale = np.abs(values).max(axis=axis, keepdims=True) / top
    return (np.rint(values / scale) + zero).astype(np.uint8 if zero else np.int8)


def nibbles(codes: Any) -> bytes:
    """4-bit integers, two per byte, the first in the low bits."""
    flat = codes.reshape(-1).astype(np.int64) & 15
    pairs: Any = flat[::2] | flat[1::2] << 4
    return bytes(pairs.astype(np.uint8).tobytes())


def in_blocks(values: Any, bits: int, block: int) -> tuple[int, tuple[int, ...], bytes]:
    """As MatMulNBits holds them: ONNX Runtime divides by a block's signed extreme."""
    half = 1 << (bits - 1)
    held = values.reshape(len(values), -1, block)
    places = np.abs(held).argmax(axis=2)[..., None]
    scale = np.take_along_axis(held, places, axis=2) / -half
    codes = np.clip(np.rint(held / scale) + half, 0, 2 * half - 1).astype(np.uint8)
    parts = codes.reshape(*codes.shape[:2], -1, 8 // bits)
    packed = (parts << (np.arange(8 // bits) * bits).astype(np.uint8)).sum(axis=3).astype(np.uint8)
    return TensorProto.UINT8, packed.shape, packed.tobytes()


def whole(values: Any) -> tuple[int, tuple[int, ...], bytes]:
    kinds = {"float32": 1, "float16": 10, "int8": 3, "uint8": 2, "float64": 11}
    return kinds[values.dtype.name], values.shape, np.ascontiguousarray(values).tobytes()


def clamped() -> Any:
    """float16 by a converter that raises tiny weights: no longer a plain rounding."""
    half = TABLE.astype(np.float16)
    half[np.abs(half) < 0.01] = 0.01
    return half


FORMS: dict[str, tuple[int, tuple[int, ...], bytes]] = {
    "int8": whole(quantised(TABLE)),
    "int8 transposed": whole(quantised(TABLE).T.copy()),
    "int8 by row": whole(quantised(TABLE, axis=1)),
    "int8 by column": whole(quantised(TABLE, axis=0)),
    "int8 by column, transposed": whole(quantised(TABLE, axis=0).T.copy()),
    "uint8 with a zero point": whole(quantised(TABLE, zero=128)),
    "int4": (TensorProto.INT4, (ROWS, COLUMNS), nibbles(quantised(TABLE, 4))),
    "uint4": (TensorProto.UINT4, (COLUMNS, ROWS), nibbles(quantised(TABLE.T, 4, zero=8))),
    "int4 in blocks of 16": in_blocks(TABLE, 4, 16),
    "int4 in blocks of 32": in_blocks(TABLE, 4, 32),
    "int8 in blocks": in_blocks(TABLE, 8, 32),
    "2 bits in blocks": in_blocks(TABLE, 2, 32),
    "scaled": whole(TABLE * np.float32(3.5)),
    "negative": whole(-TABLE),
    "a norm's gain folded in": whole(TABLE * RNG.uniform(0.1, 3, COLUMNS).astype(np.float32)),
    "the same, transposed": whole((TABLE * RNG.uniform(0.1, 3, COLUMNS).astype(np.float32)).T),
    "float16, clamped": whole(clamped()),
    "float64": whole(TABLE.astype(np.float64)),
    "padded to 128 rows": whole(np.pad(TABLE, ((0, 32), (0, 0)))),
    "padded, transposed": whole(np.pad(TABLE, ((0, 32), (0, 0))).T),
}


def case(
    folder: Path, form: tuple[int, tuple[int, ...], bytes], base: dict[str, Any], held: list[str]
) -> tuple[Path, Path]:
    """A base, and an ONNX file with some of its tensors and one in a form of its own."""
    tensors = {name: ("F32", v.shape, v.tobytes()) for name, v in base.items()}
    checkpoint = making.write(folder / "base.safetensors", tensors)
    made = onnx_files.model({name: tensors[name] for name in held})
    kind, shape, data = form
    made.graph.initializer.append(helper.make_tensor("copy", kind, shape, data, raw=True))
    made.graph.node.append(helper.make_node("Shape", ["copy"], ["copy:shape"]))
    made.graph.output.append(
        helper.make_tensor_value_info("copy:shape", TensorProto.INT64, [len(shape)])
    )
    return checkpoint, onnx_files.write(folder / "m.onnx", made)


@pytest.mark.parametrize("form", FORMS)
def test_a_tensor_with_a_copy_in_another_form_is_refused_by_name(form: str, tmp_path: Path) -> None:
    base, model = case(
        tmp_path, FORMS[form], {"embed.weight": TABLE, "b": OTHER}, ["embed.weight", "b"]
    )
    places = make_map(model, base)
    assert "embed.weight" not in places.places
    assert "b" in places.places
    delta = making.delta(base, Lora(rank=1), patterns=PATTERNS)
    with pytest.raises(
        ExportError, match=r"embed\.weight: the file also holds it quantised, .* \(copy\)"
    ):
        patch(model, delta, tmp_path / "t.onnx", places=places, base=base)


@pytest.mark.parametrize("form", ["int8", "int4 in blocks of 16", "scaled", "int4"])
def test_a_copy_of_another_tensor_of_that_shape_hinders_nothing(form: str, tmp_path: Path) -> None:
    """A model that is quantised but for one layer."""
    base, model = case(tmp_path, FORMS[form], {"embed.weight": OTHER, "b": TABLE}, ["embed.weight"])
    places = make_map(model, base)
    assert list(places.places) == ["embed.weight"]
    assert "quantised" in places.refused["b"]
    delta = making.delta(base, Lora(rank=1), patterns=PATTERNS)
    assert patch(model, delta, tmp_path / "t.onnx", places=places).targets == 1


def test_the_nearest_of_two_near_twins_is_the_source(tmp_path: Path) -> None:
    """A layer that began as a copy of another one: its int8 form is not the other's."""
    twin = (TABLE + 0.05 * OTHER).astype(np.float32)
    base, model = case(
        tmp_path, whole(quantised(twin)), {"embed.weight": TABLE, "b": twin}, ["embed.weight"]
    )
    assert list(make_map(model, base).places) == ["embed.weight"]


def test_constants_of_a_shape_by_chance_hinder_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(11)
    for form in (
        whole(np.zeros((ROWS, COLUMNS), np.float32)),
        whole(rng.integers(-128, 127, (ROWS, COLUMNS)).astype(np.int8)),
        whole(rng.normal(size=(COLUMNS, ROWS)).astype(np.float32)),
        whole(np.tri(ROWS, COLUMNS, dtype=np.float32)),
        whole(np.full((ROWS, COLUMNS), np.inf, np.float32)),
    ):
        base, model = case(tmp_path, form, {"embed.weight": TABLE}, ["embed.weight"])
        assert list(make_map(model, base).places) == ["embed.weight"]


def test_external_data_of_packed_weights_alone_are_copied(tmp_path: Path) -> None:
    """They are no base tensor's, but the model does not open without them."""
    form = (TensorProto.INT4, (8, 8), bytes(32))
    base, model = case(tmp_path, form, {"embed.weight": TABLE}, ["embed.weight"])
    made = onnx.load(str(model))
    packed = made.graph.initializer[-1]
    (tmp_path / "packed.bin").write_bytes(packed.raw_data)
    packed.ClearField("raw_data")
    packed.data_location = TensorProto.EXTERNAL
    packed.external_data.add(key="location", value="packed.bin")
    model.write_bytes(made.SerializeToString())
    places = make_map(model, base)
    assert [file.file for file in places.files] == ["m.onnx", "packed.bin"]
    (tmp_path / "t").mkdir()
    delta = making.delta(base, Lora(rank=1), patterns=PATTERNS)
    patch(model, delta, tmp_path / "t" / "m.onnx", places=places)
    assert (tmp_path / "t" / "packed.bin").read_bytes() == bytes(32)


@pytest.mark.parametrize("bits", [4, 8])
def test_onnx_runtimes_own_quantisers_are_seen_through(bits: int, tmp_path: Path) -> None:
    """An embedding that is also the output layer, of which the quantiser takes the latter."""
    pytest.importorskip("onnxruntime")
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    table = onnx.numpy_helper.from_array(TABLE, "embed.weight")
    made = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Gather", ["embed.weight", "ids"], ["x"]),
                helper.make_node("MatMul", ["x", "turned"], ["y"]),
            ],
            "tied",
            [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", ROWS])],
            [table, onnx.numpy_helper.from_array(np.ascontiguousarray(TABLE.T), "turned")],
        ),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    source, model = tmp_path / "s.onnx", tmp_path / "q.onnx"
    onnx.save(made, str(source))
    base = making.write(
        tmp_path / "base.safetensors", {"embed.weight": ("F32", TABLE.shape, TABLE.tobytes())}
    )
    assert len(make_map(source, base).places["embed.weight"]) == 2
    if bits == 8:
        quantize_dynamic(
            source, model, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"]
        )
    else:
        quantiser = MatMulNBitsQuantizer(onnx.load(str(source)), block_size=16, is_symmetric=True)
        quantiser.process()
        quantiser.model.save_model_to_file(str(model))
    with pytest.raises(ExportError, match=r"embed\.weight: the file also holds it quantised"):
        patch(
            model,
            making.delta(base, Lora(rank=1), patterns=PATTERNS),
            tmp_path / "t.onnx",
            places=make_map(model, base),
        )
