"""Adapter mode for experts that one tensor stacks: factors for each, in a graph written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper

from kilodelta.errors import InputError
from kilodelta.export.adapter.factors import base_factors, expand, in_slots
from kilodelta.export.adapter.graph import with_adapter
from kilodelta.export.adapter.layout import AdapterLayout, read_layout
from kilodelta.export.onnx.save import save
from kilodelta.export.onnx.template import Template, fill_template
from kilodelta.files.untrusted import FieldError
from kilodelta.format.delta import Delta
from kilodelta.format.methods import Lora, Nola, UniLora
from kilodelta.format.targets import Patterns
from tests.support.making import bits_of, delta, write

EXPERTS, ROWS, COLUMNS = 3, 4, 5
W = np.random.default_rng(5).normal(size=(EXPERTS, ROWS, COLUMNS)).astype(np.float32)
NAME = "experts.up"
PATTERNS = Patterns(include=(NAME,), stacked=(NAME,))
TURNED = Patterns(include=(NAME,), stacked=(NAME,), transposed=(NAME,))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("experts") / "base.safetensors"
    return write(place, {NAME: ("F32", W.shape, bits_of("F32", W))})


def template() -> Template:
    """Each token's own expert: y = W[ids] x, by Gather and MatMul, as `batched_mm` computes."""
    nodes = [
        helper.make_node("Gather", [NAME, "ids"], ["chosen"], axis=0),
        helper.make_node("MatMul", ["chosen", "x"], ["y"]),
    ]
    ports = [("ids", TensorProto.INT64, ["n"]), ("x", TensorProto.FLOAT, ["n", COLUMNS, 1])]
    graph = helper.make_graph(
        nodes,
        "experts",
        [helper.make_tensor_value_info(*port) for port in ports],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(W, NAME)],
    )
    opsets = [helper.make_opsetid("", 20)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return Template(
        model=ir.from_proto(made),
        dtype="float32",
        weights={NAME: W.shape},
        unused=(),
        inputs=(),
        outputs=(),
        opset=20,
    )


@pytest.fixture(scope="module")
def exposed(base: Path) -> tuple[Template, AdapterLayout]:
    return with_adapter(template(), base, layers={NAME}, stacks={NAME}, rank=3)


def computed(of: Template, base: Path, folder: Path, feeds: dict[str, Any]) -> Any:
    (path,) = save(fill_template(of, base), folder / "graph.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


@pytest.mark.parametrize("patterns", [PATTERNS, TURNED], ids=["straight", "turned"])
@pytest.mark.parametrize("method", [Lora(rank=2), Nola(rank=3, bases=20), UniLora(rank=2)])
def test_the_graph_computes_with_each_experts_update(
    method: Any, patterns: Patterns, base: Path, exposed: Any, tmp_path: Path
) -> None:
    wide, layout = exposed
    assert layout.exposed[0].use == "stack"
    made = delta(base, method, patterns=patterns)
    new = np.empty_like(W)
    for expert in range(EXPERTS):
        update = made.update(f"{NAME}[{expert}]")
        new[expert] = W[expert] + (update.T if patterns.transposed else update)
    rng = np.random.default_rng(1)
    feeds = {"ids": np.array([2, 0, 1, 2]), "x": rng.normal(size=(4, COLUMNS, 1))}
    feeds["x"] = feeds["x"].astype(np.float32)
    out = computed(wide, base, tmp_path, {**feeds, **expand(made, layout)})
    assert np.allclose(out, new[feeds["ids"]] @ feeds["x"], rtol=1e-5, atol=1e-5)
    plain = computed(wide, base, tmp_path, {**feeds, **base_factors(layout)})
    assert np.array_equal(plain, computed(template(), base, tmp_path, feeds))


def test_the_layout_is_written_and_read(exposed: Any, tmp_path: Path) -> None:
    _, layout = exposed
    assert layout.inputs == {
        f"{NAME}.lora_A": (EXPERTS, ROWS, 3),
        f"{NAME}.lora_B": (EXPERTS, 3, COLUMNS),
    }
    layout.write(tmp_path)
    assert read_layout(tmp_path) == layout
    place = tmp_path / "adapter.json"
    place.write_text(place.read_text().replace('"shape": [\n', '"shape": [\n    2,\n'))
    with pytest.raises((FieldError, Exception), match="not that of a stack"):
        read_layout(tmp_path)


def test_a_file_that_takes_the_stack_as_one_matrix_is_refused(base: Path, exposed: Any) -> None:
    whole = delta(base, Lora(rank=2), patterns=Patterns(include=(NAME,)))
    with pytest.raises(InputError, match="is one matrix to the file, and a matrix for each"):
        expand(whole, exposed[1])


def test_a_graph_that_takes_the_stack_as_one_matrix_is_refused(base: Path) -> None:
    _, layout = with_adapter(template(), base, include=(NAME,), rank=3)
    made: Delta = delta(base, Lora(rank=2), patterns=PATTERNS)
    with pytest.raises(InputError, match="is a matrix for each expert to the file, and one matrix"):
        expand(made, layout)


def test_slots_hold_no_stacks(base: Path, exposed: Any) -> None:
    """With slots an update of a whole weight cannot be chosen row by row."""
    from kilodelta.errors import ExportError

    with pytest.raises(ExportError, match="cannot differ from row to row"):
        with_adapter(template(), base, include=(NAME,), stacks={NAME}, slots=2)
    with pytest.raises(InputError, match="do not fit"):
        in_slots(exposed[1], [{}])
