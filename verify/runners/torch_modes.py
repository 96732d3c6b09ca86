"""Change how torch computes while a module runs: wider than the model asks, or term after term."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class Widen(TorchFunctionMode):
    """Read float32 as float64: models cast norms, softmax and rotary angles to float32 by name.

    Without it the reference would carry float32's rounding in those places.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        named = {key: _wide(value) for key, value in (kwargs or {}).items()}
        return func(*map(_wide, args), **named)


def _wide(value: object) -> object:
    return torch.float64 if value is torch.float32 else value


class InOrder(TorchFunctionMode):
    """Compute sums and means in float32, adding one term after another.

    torch adds in pairs, so its error grows with log n; ONNX Runtime and others add n terms in
    order. When few different values are averaged (a short text repeated), the roundings of such a
    sum all point the same way and its error grows with n.
    """

    LONGEST = 1 << 16
    """Terms; a longer sum is left to torch, since each term costs a call."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = _REDUCTIONS.get(func)
        result = None if rule is None else rule(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if result is None else result


def _sum(
    x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor | None:
    dims = _axes(x, dim)
    total = _total(x, dims)
    if total is None:
        return None
    return _shaped(total, x, dims, keepdim).to(dtype or x.dtype)


def _mean(
    x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor | None:
    dims = _axes(x, dim)
    total = _total(x, dims)
    if total is None:
        return None
    count = math.prod(x.shape[axis] for axis in dims)
    return _shaped(total / count, x, dims, keepdim).to(dtype or x.dtype)


def _pool(axes: int) -> Callable[..., Tensor | None]:
    def rule(x: Tensor, output_size: Any) -> Tensor | None:
        sizes = {output_size} if isinstance(output_size, int) else set(output_size)
        return _mean(x, tuple(range(-axes, 0)), keepdim=True) if sizes == {1} else None

    return rule


def _axes(x: Tensor, dim: Any) -> tuple[int, ...]:
    given = range(x.ndim) if dim is None or dim == () else (dim,) if isinstance(dim, int) else dim
    return tuple(axis % x.ndim for axis in given)


def _total(x: Tensor, dims: tuple[int, ...]) -> Tensor | None:
    """Sum over `dims` in float32, in order; None for sums that torch may take."""
    count = math.prod(x.shape[axis] for axis in dims)
    # Two terms have one order only, and float64 is the reference itself.
    if not x.is_floating_point() or x.dtype == torch.float64 or not 2 < count <= InOrder.LONGEST:
        return None
    kept = [axis for axis in range(x.ndim) if axis not in dims]
    terms = x.permute(*dims, *kept).reshape(count, *(x.shape[axis] for axis in kept))
    total = torch.zeros_like(terms[0], dtype=torch.float32)
    for term in terms:
        total += term
    return total


def _shaped(total: Tensor, x: Tensor, dims: tuple[int, ...], keepdim: bool) -> Tensor:
    if not keepdim:
        return total
    return total.reshape([1 if axis in dims else size for axis, size in enumerate(x.shape)])


_REDUCTIONS: Mapping[Any, Callable[..., Tensor | None]] = {
    torch.sum: _sum,
    torch.Tensor.sum: _sum,
    torch.mean: _mean,
    torch.Tensor.mean: _mean,
    functional.adaptive_avg_pool1d: _pool(1),
    functional.adaptive_avg_pool2d: _pool(2),
    functional.adaptive_avg_pool3d: _pool(3),
}
