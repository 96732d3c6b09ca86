"""Compute in float32 with weights that stay as a file stores them, widened while a layer runs.

A base in bfloat16 that computes in float32 would be held twice: in the file's mapped pages, and as
a copy of twice their size. Widening is exact and takes a few per cent of a training step, so a
linear layer can do it each time that it runs, forward and backward, to the same bits. The mapped
pages are memory that the system takes back when it is short.

The parameter keeps its shape, type and device, for models ask their layers for these; its values
are zeros that take no memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from kilodelta.files.tying import memory_of

_STORED = "_kilodelta_stored"
"""The attribute in which a layer holds its weight as the file stores it."""


def can_widen(module: nn.Module, trained: Collection[str] = ()) -> dict[str, nn.Linear]:
    """List the linear layers whose weight nothing else uses, by the weight's state name.

    Args:
        module: the model.
        trained: state names of weights whose values are not the file's.

    Example:
        >>> list(can_widen(nn.Sequential(nn.Linear(2, 2), nn.ReLU()).requires_grad_(False)))
        ['0.weight']
    """
    held = (p for owner in module.modules() for p in owner._parameters.values())
    uses = Counter(memory_of(parameter) for parameter in held if parameter is not None)
    return {
        name: owner
        for name, owner in ((f"{path}.weight", owner) for path, owner in module.named_modules())
        if type(owner) is nn.Linear
        and "forward" not in owner.__dict__  # a head that is computed late
        and type(owner.weight) is nn.Parameter
        and uses[memory_of(owner.weight)] == 1
        and owner.weight.dtype == torch.float32
        and owner.weight.device.type == "cpu"
        and not owner.weight.requires_grad
        and name not in trained
    }


@contextmanager
def widened(layers: Mapping[str, nn.Linear], stored: Mapping[str, Tensor]) -> Iterator[None]:
    """Let linear layers compute in this block with weights in a narrower type.

    Args:
        layers: as `can_widen` lists them, at least those of `stored`.
        stored: by the same names, the weights' values, (out, in) in bfloat16 or float16.

    Example:
        >>> layer, x = nn.Linear(3, 2).requires_grad_(False), torch.ones(1, 3)
        >>> layer.weight.copy_(layer.weight.bfloat16())[:0]
        tensor([], size=(0, 3))
        >>> y = layer(x)
        >>> with widened({"": layer}, {"": layer.weight.bfloat16()}):
        ...     layer.weight.untyped_storage().nbytes(), torch.equal(layer(x), y)
        (4, True)
        >>> torch.equal(layer(x), y)
        True
    """
    for name, values in stored.items():
        layer = layers[name]
        layer.weight.data = layer.weight.data.new_zeros(1).expand(layer.weight.shape)
        layer.__dict__[_STORED] = values
        layer.__dict__["forward"] = partial(_forward, layer)
    try:
        yield
    finally:
        for name, values in stored.items():
            layer = layers[name]
            del layer.__dict__["forward"], layer.__dict__[_STORED]
            layer.weight.data = values.to(layer.weight.dtype)


def weight_of(layer: nn.Module) -> Any:
    """Return a layer's frozen weight; one that stays as it is stored, as a widened copy."""
    weight = layer._parameters.get("weight")
    stored = layer.__dict__.get(_STORED)
    return weight if stored is None or weight is None else stored.to(weight.dtype)


def _forward(layer: nn.Linear, input: Tensor) -> Tensor:
    if "weight" in layer.__dict__:  # W + dW stands in its place
        return linear(input, layer.weight, layer.bias)
    result: Tensor = _Widened.apply(  # type: ignore[no-untyped-call]
        input, layer.__dict__[_STORED], layer.bias
    )
    return result


class _Widened(torch.autograd.Function):
    """A linear layer with a frozen weight, whose wide copy does not outlive a product."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, stored: Tensor, bias: Tensor | None) -> Tensor:
        ctx.stored = stored  # no activation: it is there anyway
        return linear(given, stored.to(given.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grown: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        back = grown @ ctx.stored.to(grown.dtype) if ctx.needs_input_grad[0] else None
        needs_bias = ctx.needs_input_grad[2]
        return back, None, grown.reshape(-1, grown.shape[-1]).sum(0) if needs_bias else None
