"""Translate operators that torch's exporter has no ONNX function for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset18 as op


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return ONNX functions by operator, as `torch.onnx.export` takes them.

    `_is_all_true` stands where a model checks its inputs with `torch._check_tensor_all`, as
    transformers' vision-language models do for the number of pictures. The check itself is dropped
    by the exporter, and with it what computes its condition.
    """
    return {torch.ops.aten._is_all_true.default: _is_all_true}


def _is_all_true(x: Any) -> Any:
    """Return whether all booleans are true, as a boolean of no dimensions."""
    return op.Cast(op.ReduceMin(op.Cast(x, to=6), keepdims=0), to=9)
