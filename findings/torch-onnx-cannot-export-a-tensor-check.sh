#!/usr/bin/env bash
# A check that a model states by torch._check_tensor_all, which is made for compilers ("if cond: raise"
# would be control flow), passes torch.export and then stops torch.onnx.export: no ONNX function for
# aten._is_all_true. torch._check of a number in its place is dropped and exports. So LLaVA and other
# vision-language models of transformers 5, whose check of the number of pictures in a text is made so,
# do not export. torch 2.13.0, onnxscript 0.7.2. Met by whoever exports them, or adds such a check.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q torch==2.13.0 onnxscript==0.7.2 onnx==1.23.2 numpy==2.4.6
"$work/env/bin/python" -W ignore - 2>"$work/log" <<'PY' || { cat "$work/log"; exit 1; }
import torch
from torch import nn

print("torch", torch.__version__)


class ByTensor(nn.Module):
    def forward(self, x):
        torch._check_tensor_all((x > -9).all(), lambda: "too small")
        return 2 * x


class ByNumber(nn.Module):
    def forward(self, x):
        torch._check(x.shape[0] < 9, lambda: "too many")
        return 2 * x


def outcome(module):
    """Say what torch.export and torch.onnx.export make of a module."""
    x = (torch.ones(2, 3),)
    nodes = [str(n.target) for n in torch.export.export(module.eval(), x).graph.nodes]
    try:
        program = torch.onnx.export(module, x, dynamo=True, verbose=False)
    except torch.onnx.OnnxExporterError as error:
        while error.__cause__ is not None:
            error = error.__cause__
        return nodes, str(error).split(". ")[0]
    return nodes, [node.op_type for node in program.model.graph]


nodes, by_tensor = outcome(ByTensor())
print("torch._check_tensor_all, torch.export:", nodes)
print("torch._check_tensor_all, torch.onnx.export:", by_tensor)
assert any("_is_all_true" in node for node in nodes)
assert isinstance(by_tensor, str) and "_is_all_true" in by_tensor, "it exports now"
_, by_number = outcome(ByNumber())
print("torch._check, torch.onnx.export:", by_number)
assert by_number == ["Mul"]
PY
