"""Multiply in bfloat16 with frozen float32 weights, while a training step is taken.

Most of a step's time goes into the frozen layers' products. A processor with units for bfloat16
computes them two to three times as fast, adding up in float32. All else stays in float32: weights
in memory, the sums along the layers, attention, normalisation, and the update beside a weight with
its gradient. PyTorch calls this a float32 product of medium precision, and has it for some GPUs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

SMALLEST = 1 << 16
"""Weights of a layer from which narrow products pay: below, converting costs what they save.
Measured on Zen 4: 256 x 256 with 128 rows takes 0.7 of the time in float32, 128 x 128 all of it."""
_FORWARD = "forward"
_HIDDEN = "weight"
"""Where W + dW stands in the place of W, as an attribute of the instance."""


def can_narrow(module: nn.Module) -> list[nn.Linear]:
    """List the frozen linear layers, large enough, that compute in float32.

    Args:
        module: the model, with everything else attached to it.

    Example:
        >>> small, large = nn.Linear(8, 8), nn.Linear(256, 256)
        >>> model = nn.Sequential(small, large).requires_grad_(False)
        >>> can_narrow(model) == [large]
        True
    """
    return [
        layer
        for layer in module.modules()
        if type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and layer.weight.dtype == torch.float32
        and layer.weight.numel() >= SMALLEST
        and not layer.weight.requires_grad
        and _FORWARD not in layer.__dict__  # a head that is computed late, or a weight in its file
    ]


@contextmanager
def narrowed(layers: Iterable[nn.Linear]) -> Iterator[None]:
    """Let linear layers multiply in bfloat16 in this block, forward and backward.

    Args:
        layers: as `can_narrow` lists them.

    Example:
        >>> layer, x = nn.Linear(1, 1, bias=False).requires_grad_(False), torch.ones(1, 1)
        >>> layer.weight.fill_(1 + 2**-12)[:0]
        tensor([], size=(0, 1))
        >>> with narrowed([layer]):
        ...     layer(x).item()
        1.0
        >>> layer(x).item() == 1 + 2**-12
        True
    """
    chosen = list(layers)
    for layer in chosen:
        layer.__dict__[_FORWARD] = partial(_forward, layer)
    try:
        yield
    finally:
        for layer in chosen:
            del layer.__dict__[_FORWARD]


def _forward(layer: nn.Linear, input: Tensor) -> Tensor:
    if _HIDDEN in layer.__dict__ or input.dtype != torch.float32:
        return linear(input, layer.weight, layer.bias)
    result: Tensor = _Narrowed.apply(  # type: ignore[no-untyped-call]
        input, layer.weight, layer.bias
    )
    return result


class _Narrowed(torch.autograd.Function):
    """A linear layer with a frozen weight, whose narrow copy does not outlive a product."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # no activation: it is there anyway
        product = linear(given.bfloat16(), weight.bfloat16()).float()
        return product if bias is None else product.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grown: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        back = None
        if ctx.needs_input_grad[0]:
            back = (grown.bfloat16() @ ctx.weight.bfloat16()).float()
        over = tuple(range(grown.dim() - 1))
        return back, None, grown.sum(over) if ctx.needs_input_grad[2] else None
