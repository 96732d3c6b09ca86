"""Choose how mixture-of-experts layers of transformers compute.

Their default, `grouped_mm`, multiplies by an operator that knows neither float64 nor ONNX.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from torch import nn

EXPORTED: Literal["batched_mm"] = "batched_mm"
"""Gathers the chosen experts' matrices for every token: plain operators with fixed shapes, which
ONNX has. Memory grows with the number of tokens."""

EXACT: Literal["eager"] = "eager"
"""A loop over the experts, which runs in every precision and cannot be traced."""


def use(module: nn.Module, implementation: Literal["batched_mm", "eager"]) -> None:
    """Set the experts implementation of every transformers model in `module`, in place.

    Modules without experts, and experts that offer no choice, stay as they are.
    """
    for part in _with_choice(module):
        part.set_experts_implementation(implementation)


def are(module: nn.Module, implementation: Literal["batched_mm", "eager"]) -> bool:
    """Return whether all experts in `module` that offer a choice compute by an implementation."""
    configs = [part.config for part in _with_choice(module)]
    return all(getattr(c, "_experts_implementation", None) == implementation for c in configs)


def _with_choice(module: nn.Module) -> Iterator[Any]:
    for part in module.modules():
        can_set = getattr(part, "_can_set_experts_implementation", None)
        if can_set is not None and can_set():
            yield part
