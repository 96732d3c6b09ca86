"""Tell what a module's parameters are: weights of layers, which fine-tunes change, or others.

`compress` takes the layers' weights as targets, and a device folder lets fine-tunes change them,
where nobody names others; both ask here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from kilodelta.models.stacked import is_stacked


def layer_weights(module: nn.Module, names: Mapping[str, str]) -> frozenset[str]:
    """Return the checkpoint names of the weights of layers: linear and recurrent ones,
    convolutions, routers, attention's packed projections, and experts, one by one or stacked.

    Args:
        module: any.
        names: checkpoint name to state name, as in `LoadedModel.names`.

    Example:
        >>> module = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3), nn.LayerNorm(3))
        >>> sorted(layer_weights(module, {name: name for name in module.state_dict()}))
        ['1.weight']
    """
    kind = dict(kinds(module))
    return frozenset(name for name, state in names.items() if kind.get(state, "other") != "other")


def stacked_weights(module: nn.Module, names: Mapping[str, str]) -> frozenset[str]:
    """Return the checkpoint names of the parameters that hold several experts' matrices.

    Args:
        module: any.
        names: checkpoint name to state name, as in `LoadedModel.names`.
    """
    kind = dict(kinds(module))
    return frozenset(n for n, state in names.items() if kind.get(state, "").startswith("experts"))


def kinds(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield every parameter's state name with its kind: `linear`, `conv1d`, `experts` (a stack of
    matrices), `experts_in_out` (one of matrices that are stored (in, out)) or `other`."""
    for path, owner in module.named_modules(remove_duplicate=False):
        for attribute, parameter in owner._parameters.items():
            if parameter is not None:
                name = f"{path}.{attribute}" if path else attribute
                yield name, _kind(owner, attribute, tuple(parameter.shape))


def _kind(owner: nn.Module, attribute: str, shape: tuple[int, ...]) -> str:
    if isinstance(owner, nn.MultiheadAttention):  # it holds its projections as bare parameters
        return "linear" if attribute.endswith("proj_weight") else "other"
    if isinstance(owner, (nn.RNNBase, nn.RNNCellBase)):
        return "linear" if attribute.startswith("weight") else "other"
    if is_stacked(owner):  # matrices of experts, as linear layers store them
        return "linear"
    if is_stack(owner, attribute, shape):
        return "experts_in_out" if stores_in_out(owner, attribute, shape) else "experts"
    if len(shape) == 2 and type(owner).__name__ in READ_FROM_OUTSIDE:
        return "linear"  # all experts of a kind, one below the other
    if attribute != "weight" or len(shape) < 2:
        return "other"
    if is_conv1d(owner):
        return "conv1d"
    if isinstance(owner, (nn.Linear, nn.modules.conv._ConvNd)):
        return "linear"
    return "linear" if _is_router(owner, shape) else "other"


def _is_router(owner: nn.Module, shape: tuple[int, ...]) -> bool:
    """Return whether a module is a mixture's router: a bare (experts, width) matrix."""
    kind = type(owner).__name__
    return len(shape) == 2 and min(shape) > 1 and kind.endswith(("Router", "Gate"))


def is_stack(owner: nn.Module, attribute: str, shape: Sequence[int]) -> bool:
    """Return whether a parameter holds the matrices of several experts, (experts, rows, columns).

    Such a parameter has three dimensions, and it or its module is called so (`GptOssExperts`), or
    the module has as many experts. A convolution's has three as well.

    Example:
        >>> class Experts(nn.Module):
        ...     pass
        >>> shape = 8, 16, 4
        >>> is_stack(Experts(), "down_proj", shape), is_stack(nn.Conv1d(16, 8, 4), "weight", shape)
        (True, False)
    """
    if len(shape) != 3 or isinstance(owner, nn.modules.conv._ConvNd):
        return False
    counts = (getattr(owner, name, None) for name in ("num_experts", "n_experts"))
    return "expert" in f"{type(owner).__name__} {attribute}".lower() or shape[0] in counts


def stores_in_out(owner: nn.Module, attribute: str, shape: Sequence[int]) -> bool:
    """Return whether a module stores a weight (in, out): Conv1D, and stacks of some experts."""
    if not is_stack(owner, attribute, shape):
        return is_conv1d(owner)
    # transformers' decorator of experts sets `is_transposed`; Llama 4's experts are without it.
    return getattr(owner, "is_transposed", type(owner).__name__ in _IN_OUT) is True


_IN_OUT = ("Llama4TextExperts",)

READ_FROM_OUTSIDE = frozenset({"DbrxExpertGLU"})
"""Classes whose parameters the module around them reads, before it calls their forward pass."""


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is transformers' Conv1D, whose weight is stored (in, out)."""
    loaded: Any = sys.modules.get("transformers.pytorch_utils")
    return loaded is not None and isinstance(module, loaded.Conv1D)
