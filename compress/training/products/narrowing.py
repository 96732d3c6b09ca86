"""Multiply in a narrow type with frozen float32 weights, while a training step is taken.

Most of a step's time goes into the frozen layers' products. A processor with units for bfloat16
computes them two to three times as fast, adding up in float32, and one with units for sums of
8-bit products (VNNI) four times. All else stays in float32: weights in memory, the sums along the
layers, attention, normalisation, and the update beside a weight with its gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from kilodelta.compress.training.products.rounded import FLOAT32, PRODUCTS, Products

SMALLEST = 1 << 16
"""Weights of a layer from which narrow products pay: below, converting costs what they save.
Measured on Zen 4: 256 x 256 with 128 rows takes 0.7 of the time in float32, 128 x 128 all of it."""
BESIDE = "_kilodelta_beside"
"""The attribute of a layer with the update that its product may add by itself."""
_FORWARD = "forward"
_HIDDEN = "weight"
"""Where W + dW stands in the place of W, as an attribute of the instance."""


@dataclass
class Beside:
    """An update of few columns, left right^T, that is offered to a layer's product.

    Attributes:
        left: (out, K), float32.
        right: (in, K), float32.
        added: whether the product has added it.
    """

    left: Tensor
    right: Tensor
    added: bool = False


def can_narrow(module: nn.Module, products: Products) -> list[nn.Linear]:
    """List the linear layers, large enough, that compute in float32, and whose weight is frozen.

    Without gradients (`torch.no_grad`) every weight is.

    Args:
        module: the model, with everything else attached to it.
        products: how they are to multiply.

    Example:
        >>> from kilodelta.compress.training.products.rounded import Bfloat16
        >>> small, large = nn.Linear(8, 8), nn.Linear(256, 256)
        >>> model = nn.Sequential(small, large).requires_grad_(False)
        >>> can_narrow(model, Bfloat16()) == [large]
        True
    """
    return [
        layer
        for layer in module.modules()
        if type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and layer.weight.dtype == torch.float32
        and layer.weight.numel() >= SMALLEST
        and (products.longest is None or max(layer.weight.shape) <= products.longest)
        and not (layer.weight.requires_grad and torch.is_grad_enabled())
        and _FORWARD not in layer.__dict__  # a head that is computed late, or a weight in its file
    ]


class Narrowed:
    """Linear layers of a model that multiply in a narrow type while they are told to."""

    def __init__(self, layers: Iterable[nn.Linear], products: Products) -> None:
        """Note the layers, as `can_narrow` lists them, and how they are to multiply."""
        self.layers, self.products = tuple(layers), products

    @classmethod
    def of(cls, module: nn.Module, products: str) -> Narrowed | None:
        """Choose the layers of a model.

        Args:
            module: the model, with everything else attached to it.
            products: the type, a name of `PRODUCTS`; for "float32" there is nothing to do.
        """
        if products == FLOAT32:
            return None
        how = PRODUCTS[products]()
        layers = can_narrow(module, how)
        for layer in layers:
            how.hold(layer.weight)
        return cls(layers, how)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let the layers multiply so in this block, forward and backward.

        Example:
            >>> from kilodelta.compress.training.products.rounded import Bfloat16
            >>> layer, x = nn.Linear(1, 1, bias=False).requires_grad_(False), torch.ones(1, 1)
            >>> layer.weight.fill_(1 + 2**-12)[:0]
            tensor([], size=(0, 1))
            >>> with Narrowed([layer], Bfloat16()).used():
            ...     layer(x).item()
            1.0
            >>> layer(x).item() == 1 + 2**-12
            True
        """
        last = _Last(self.products)
        for layer in self.layers:
            layer.__dict__[_FORWARD] = partial(_forward, layer, last)
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.__dict__[_FORWARD]


class _Last:
    """The input that was rounded last: queries, keys and values are made of the same one."""

    def __init__(self, products: Products) -> None:
        self.products = products
        self._kept: tuple[Tensor, int, Any] | None = None

    def rounded(self, given: Tensor) -> Any:
        kept = self._kept
        if kept is None or kept[0] is not given or kept[1] != given._version:
            with torch.no_grad():
                rows = self.products.rounded(given.detach().reshape(-1, given.shape[-1]))
            self._kept = kept = given, given._version, rows
        return kept[2]


def _forward(layer: nn.Linear, last: _Last, input: Tensor) -> Tensor:
    if _HIDDEN in layer.__dict__ or input.dtype != torch.float32:
        return linear(input, layer.weight, layer.bias)
    left = right = None
    if (beside := layer.__dict__.get(BESIDE)) is not None:
        left, right, beside.added = beside.left, beside.right, True
    result: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
        input, layer.weight, layer.bias, left, right, last
    )
    return result


class _Product(torch.autograd.Function):
    """Compute a linear layer with a frozen weight, and the update beside it, in one node.

    y = x W^T + b + (x right) left^T: as separate nodes the update costs another pass over y, over
    the gradient of x, and some twenty calls.
    """

    @staticmethod
    def forward(
        ctx: Any,
        given: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        left: Tensor | None,
        right: Tensor | None,
        last: _Last,
    ) -> Tensor:
        ctx.weight, ctx.products = weight, last.products  # no activation: it is there anyway
        made = last.products.forward(last.rounded(given), weight)
        if bias is not None:
            made.add_(bias)
        if left is not None and right is not None:
            # Along the long axis, as `FactoredUpdate` lays them out.
            ups, downs = left.t().contiguous(), right.t().contiguous()
            rows = given.reshape(-1, given.shape[-1])
            hidden = rows @ downs.t()
            made.addmm_(hidden, ups)
            ctx.save_for_backward(rows, hidden, ups, downs)
        return made.view(*given.shape[:-1], made.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grown: Tensor) -> tuple[Tensor | None, ...]:
        needs_given, _, needs_bias, needs_left, needs_right, _ = ctx.needs_input_grad
        flat = grown.reshape(-1, grown.shape[-1])
        back = left = right = None
        if ctx.saved_tensors:
            rows, hidden, ups, downs = ctx.saved_tensors
            through = flat @ ups.t()
            left = (hidden.t() @ flat).t() if needs_left else None
            right = (through.t() @ rows).t() if needs_right else None
        if needs_given:
            back = ctx.products.backward(ctx.products.rounded(flat), ctx.weight)
            if ctx.saved_tensors:
                back.addmm_(through, downs)
            back = back.view(*grown.shape[:-1], back.shape[-1])
        return back, None, flat.sum(0) if needs_bias else None, left, right, None
