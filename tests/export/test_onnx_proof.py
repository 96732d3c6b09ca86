"""No weight is lost, folded or transposed between the module and its graph without a word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxscript")

import onnx_ir as ir
import torch
from torch import Tensor, nn

from kilodelta.errors import ExportError
from kilodelta.export.onnx import make, named
from kilodelta.export.onnx.clean import clean
from kilodelta.export.onnx.proof import require_kept
from kilodelta.export.onnx.trace import trace
from kilodelta.models import LoadedModel


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.lin(x)
        return found


def export() -> Any:
    torch.manual_seed(0)
    net = Net().eval()
    loaded = LoadedModel(
        source="net", module=net, kind="any", names={n: n for n in net.state_dict()}
    )
    return make.export_template(loaded, {"x": torch.randn(2, 4)})


def test_a_weight_that_simplifying_replaces_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an optimiser would that folds a weight into a constant of its own."""

    def folding(model: Any) -> None:
        clean(model)
        [weight] = [v for v in model.graph.initializers.values() if v.shape.numpy() == (3, 4)]
        constant = ir.Value(
            name="folded", const_value=ir.tensor(np.ones((3, 4), np.float32), name="folded")
        )
        model.graph.register_initializer(constant)
        weight.replace_all_uses_with(constant)

    monkeypatch.setattr(named, "clean", folding)
    with pytest.raises(ExportError, match=r"simplifying the graph lost lin\.weight"):
        export()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda w: np.ascontiguousarray(w.T), "transposed"),
        (lambda w: w * np.float32(2), "folded"),
    ],
    ids=["transposed", "scaled"],
)
def test_a_weight_that_torch_changes_is_named(
    change: Callable[[Any], Any], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changing(*arguments: Any) -> Any:
        found = trace(*arguments)
        for value in found.model.graph.initializers.values():
            if value.shape.numpy() == (3, 4):
                values = change(value.const_value.numpy())
                value.const_value = ir.tensor(values, name=value.name)
        return found

    monkeypatch.setattr(named, "trace", changing)
    with pytest.raises(ExportError, match=rf"does not hold lin\.weight \({what}\)"):
        export()


def test_weights_that_no_output_depends_on_may_go() -> None:
    graph = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 20}), ir_version=10)
    require_kept(graph, {"idle": []}, used=[])
    with pytest.raises(ExportError, match="lost idle"):
        require_kept(graph, {"idle": []}, used=["idle"])
