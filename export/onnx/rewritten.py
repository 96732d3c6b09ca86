"""Rewrite, while a model is traced, what torch's exporter mishandles, as operators of equal value.

An integral tensor that meets a Python float is promoted before the operator, not by it: of
`1.0 - mask` torch 2.13 cannot decompose the promotion (pytorch/pytorch#194381). A new axis is given
to the two parts of a complex tensor, since no ONNX function exists for one of the whole. Chunks of
an axis that varies are slices of it: the sequence that torch writes for them cannot be simplified.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_ARITHMETIC = frozenset(
    {
        torch.rsub,
        torch.sub,
        torch.mul,
        Tensor.sub,
        Tensor.mul,
        Tensor.__sub__,
        Tensor.__rsub__,
        Tensor.__mul__,
        Tensor.__rmul__,
    }
)
_CHUNKS = frozenset({torch.chunk, Tensor.chunk})
_NEW_AXIS = frozenset({torch.unsqueeze, Tensor.unsqueeze, Tensor.__getitem__})


class Rewritten(TorchFunctionMode):
    """Applies the rewrites to every call inside its block.

    Example:
        >>> with Rewritten():
        ...     1.0 - torch.tensor([1, 0])
        tensor([0., 1.])
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call `func`, or what equals it."""
        given = dict(kwargs or {})
        if func in _ARITHMETIC and len(args) == 2 and _is_promoted(*args):
            return func(args[0].to(torch.get_default_dtype()), args[1], **given)
        if func in _NEW_AXIS and isinstance(args[0], Tensor) and args[0].is_complex():
            parts = (func(part, *args[1:], **given) for part in (args[0].real, args[0].imag))
            return torch.complex(*parts)
        made = func(*args, **given)
        return _slices(args[0], made, *args[2:], **given) if func in _CHUNKS else made


def _slices(
    whole: Tensor, chunks: tuple[Tensor, ...], dim: int = 0, **given: Any
) -> tuple[Tensor, ...]:
    """Return the chunks of a tensor as slices of it, where its size there is a symbol."""
    size = chunks[0].shape[dim]
    if not isinstance(whole.shape[dim], torch.SymInt):
        return chunks
    index: list[Any] = [slice(None)] * whole.dim()
    parts = []
    for n in range(len(chunks)):
        index[dim] = slice(n * size, (n + 1) * size)
        parts.append(whole[tuple(index)])
    return tuple(parts)


def _is_promoted(tensor: Any, number: Any) -> bool:
    """Return whether torch would make floats of an integral tensor because of a Python float."""
    return (
        isinstance(tensor, Tensor)
        and isinstance(number, float)
        and not tensor.is_floating_point()
        and not tensor.is_complex()
    )
