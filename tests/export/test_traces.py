"""The traces that these tests remember give the files that tracing anew gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("transformers")

import torch
from torch import nn

from kilodelta.export.onnx import named
from kilodelta.export.onnx.make import export_template
from kilodelta.export.onnx.save import save
from kilodelta.export.onnx.template import fill_template
from kilodelta.models import LoadedModel, open_model
from tests.support import pico, traces


def test_a_remembered_trace_is_the_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kilodelta.export.onnx.trace import trace

    calls: list[Any] = []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return trace(*arguments)

    base = pico.resnet(tmp_path / "base")
    tuned = pico.tuned(base, tmp_path / "tuned")
    monkeypatch.setattr(named, "trace", counted)
    (direct,) = save(fill_template(export_template(open_model(base)), tuned), tmp_path / "1.onnx")
    assert len(calls) == 1
    monkeypatch.setattr(named, "trace", traces.remembered(counted, tmp_path / "traces"))
    for name, model in (("2.onnx", base), ("3.onnx", tuned)):  # weights play no part
        template = export_template(open_model(model))
        (path,) = save(fill_template(template, tuned), tmp_path / name)
        assert path.read_bytes() == direct.read_bytes()
    assert len(calls) == 2


def test_classes_and_configurations_that_differ_have_keys_of_their_own(tmp_path: Path) -> None:
    class Other(nn.Linear):
        pass

    layer = nn.Linear(2, 2)
    axes = {"x": {0: "batch"}}
    batch = {"x": layer.weight.detach()}
    first = traces.key(layer, batch, axes)
    assert first is not None
    assert first == traces.key(layer, batch, axes)
    assert traces.key(Other(2, 2), batch, axes) is None
    assert traces.key(layer, batch, {"x": {}}) != first
    layer.extra = 3  # type: ignore[assignment]
    assert traces.key(layer, batch, axes) != first


class Checked(nn.Module):
    """Checks a condition on tensors, as transformers' vision-language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._check_tensor_all(torch.isfinite(x).all(), lambda: "not finite")  # type: ignore[no-untyped-call]
        out: torch.Tensor = self.layer(x)
        return out


def test_a_models_own_check_of_tensors_is_dropped(tmp_path: Path) -> None:
    # torch's exporter alone has no ONNX function for the check's operator, and fails.
    torch.manual_seed(0)
    module = Checked().eval()
    loaded = LoadedModel(
        source="m", module=module, kind="any", names={n: n for n in module.state_dict()}
    )
    template = export_template(loaded, {"x": torch.randn(3, 4)}, dtype="float32", sizes={})
    assert not {"ReduceMin", "IsNaN", "IsInf"} & {n.op_type for n in template.model.graph}
    assert template.notes == ()
