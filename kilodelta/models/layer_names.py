"""Tell kinds of layers by tensor names and `config.json`, without loading the model.

A safetensors file does not say whether a matrix belongs to a Linear, a Conv1D or an Embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TABLES = frozenset({"wte", "wpe", "shared"})
CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
CONV1D = frozenset({"c_attn", "c_fc", "c_proj", "q_attn"})
"""Modules that GPT-2's relatives store as (in, out)."""


def owner(name: str) -> str:
    """Return the module path of a tensor's name; empty for a tensor of the model itself.

    Example:
        >>> owner("encoder.layer.0.dense.weight")
        'encoder.layer.0.dense'
    """
    return name.rpartition(".")[0]


def is_embedding(name: str) -> bool:
    """Return whether a weight is by its name the table of an Embedding."""
    last = owner(name).rpartition(".")[2].lower()
    return last in TABLES or ("embed" in last and not last.endswith(("_out", "proj")))


def is_of_experts(name: str) -> bool:
    """Return whether a tensor is by its name one of a mixture's experts.

    Example:
        >>> is_of_experts("layers.0.mlp.experts.down_proj"), is_of_experts("layers.0.conv.weight")
        (True, False)
    """
    return any(word in name.lower() for word in ("expert", "moe"))


def is_conv1d(name: str, config: Mapping[str, Any]) -> bool:
    """Return whether a weight is by its name the (in, out) matrix of a Conv1D."""
    last = owner(name).rpartition(".")[2]
    return config.get("model_type") in CONV1D_MODELS and last in CONV1D
