"""Models that magnify rounding pass, and a wrong merge of them, as small as it can be, fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

pytest.importorskip("transformers")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import kilodelta
from kilodelta.device.golden import reference as device_reference
from kilodelta.device.golden.probe import require_close
from kilodelta.errors import ProofError
from kilodelta.models import open_model, outputs
from kilodelta.verify.parity.cases import Case
from kilodelta.verify.parity.judge import judge
from kilodelta.verify.parity.reference import Reference
from kilodelta.verify.runners.onnx_runner import OnnxRunner
from kilodelta.verify.runners.torch_runner import TorchRunner
from tests.models.architectures import TABLE
from tests.models.steps import Case as Folders

pytestmark = pytest.mark.slow


def folders(name: str, folder: Path) -> Folders:
    [architecture] = [a for a in TABLE if a.name == name]
    case = Folders(architecture, folder)
    case.compress()
    case.merge()
    return case


def one_coefficient_off(case: Folders) -> dict[str, Any]:
    """What is merged of a file that has one coefficient one step higher: the tensors it changes."""
    right = kilodelta.load(case.delta, base=case.base)
    blob = right.blob.copy()
    blob[0] += 1
    wrong = replace(right, blob=blob)
    merged = load_file(case.merged / "model.safetensors")
    changes = {name: wrong.update(name) - right.update(name) for name in right.targets}
    return {name: merged[name] + change for name, change in changes.items() if change.any()}


def test_a_single_logit_near_zero(tmp_path: Path) -> None:
    import onnx

    case = folders("x-clip", tmp_path)
    case.export()
    merged, base = open_model(case.merged), open_model(case.base)
    batches = [case.of.inputs(*size) for size in case.of.sizes]
    names = tuple(outputs(merged, batches[0]))
    against = Reference(
        merged.view(),
        base.view(),
        outputs=names,
        cases=[
            Case(name=str(i), batch={n: t.numpy() for n, t in batch.items()})
            for i, batch in enumerate(batches)
        ],
    )
    graph = onnx.load(case.out / "model.fp32.onnx")

    def status(values: Callable[[str, Any], Any]) -> str:
        changed = onnx.ModelProto()
        changed.CopyFrom(graph)
        for tensor in changed.graph.initializer:
            array = onnx.numpy_helper.to_array(tensor)
            new = values(tensor.name, array)
            if new is not array:
                tensor.CopyFrom(onnx.numpy_helper.from_array(new.astype(array.dtype), tensor.name))
        runner = OnnxRunner(changed.SerializeToString(), device="cpu", folder=case.out)
        return judge(runner, against, artefact="file", precision="float32").status

    assert status(lambda name, array: array) == "passed"
    wrong = one_coefficient_off(case)
    assert len(wrong) == 1
    assert status(lambda name, array: wrong.get(name, array)) == "failed"
    right = load_file(case.merged / "model.safetensors")
    q, k = (f"text_model.encoder.layers.0.self_attn.{p}_proj.weight" for p in "qk")
    swap = {q: right[k], k: right[q]}
    assert status(lambda name, array: swap.get(name, array)) == "failed"


def test_a_device_whose_base_magnifies_rounding(tmp_path: Path) -> None:
    """DETR's boxes: ONNX Runtime is off by 2.6e-6, where torch is by 5e-7."""
    case = folders("detr", tmp_path)
    assert case.adapter() == ""
    assert case.patch() == ""
    base = open_model(case.base)
    batch = device_reference.golden_inputs(base, case.inputs, device_reference.ROWS)
    known = device_reference.exact(base, batch)
    limits = device_reference.limits(base, known, "float32")
    assert max(most.relative_l2 for most in limits.values()) < 1e-4

    def require(change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        other = open_model(case.base)
        other.module.load_state_dict(change(dict(other.module.state_dict())))
        runner = TorchRunner(other.view(), list(known.outputs), precision="float32", device="cpu")
        require_close(runner.run(known.inputs), known, limits)

    require(lambda state: state)
    second = "model.encoder.layers.0.self_attn.v_proj.weight"

    def one_off(state: dict[str, Any]) -> dict[str, Any]:
        weight = state[second].clone()
        weight[1, 2] += 1e-3 * weight.abs().max()
        return {**state, second: weight}

    for change in (one_off, lambda state: {**state, second: state[second].T.contiguous()}):
        with pytest.raises(ProofError, match="is off"):
            require(change)
