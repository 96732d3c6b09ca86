"""Twins: unique random values in place of a model's weights, by which every tensor is recognised.

Real weights cannot prove which tensor went where, because many are equal (norms at one, biases at
zero). In a twin no two tensors, nor one and another's transpose, hold the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kilodelta.files.tying import memory_of

Spec = tuple[tuple[int, ...], torch.dtype]


def content(array: npt.NDArray[Any]) -> str:
    """Fingerprint a tensor: its shape and bytes."""
    state = hashlib.sha256(repr(array.shape).encode())
    state.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return state.hexdigest()


def content_of(tensor: Tensor) -> str:
    """Fingerprint a torch tensor of any dtype; bfloat16 by its bits."""
    return content(bits(tensor))


def bits(tensor: Tensor) -> npt.NDArray[Any]:
    """Return a tensor's bytes as unsigned integers of its item size, in its shape."""
    kinds = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}
    flat = tensor.detach().cpu().contiguous()
    unsigned: npt.NDArray[Any] = flat.view(kinds[tensor.element_size()]).numpy()
    return unsigned


def transposed(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Transpose a matrix; return anything else unchanged."""
    return array.T if array.ndim == 2 else array


def unique(specs: Mapping[str, Spec]) -> dict[str, Tensor]:
    """Random tensors of the given shapes and dtypes, no two alike; the same ones every time.

    Floats lie in [1, 2), so they suit variances too. A tensor too small to be unique by itself
    (a bfloat16 scalar has 128 such values) is drawn until it is.
    """
    generator = torch.Generator().manual_seed(0)
    seen: set[str] = set()
    values = {}
    for name, (shape, dtype) in sorted(specs.items(), key=lambda item: _size(item[1])):
        values[name] = _fresh(shape, dtype, generator, seen)
        seen.update(_prints(values[name]))
    return values


def _size(spec: Spec) -> int:
    return int(np.prod(spec[0], dtype=np.int64))


def _fresh(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, seen: set[str]
) -> Tensor:
    for attempt in range(1000):
        tensor = _draw(shape, dtype, generator, attempt)
        if tensor.numel() == 0 or seen.isdisjoint(_prints(tensor)):
            break
    return tensor


def _draw(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, attempt: int
) -> Tensor:
    if not dtype.is_floating_point:
        high = 2 if dtype == torch.bool else 127
        return torch.randint(0, high, shape, generator=generator).to(dtype)
    stretch = 2.0 ** (attempt // 100)
    return (stretch * (1 + torch.rand(shape, generator=generator))).to(dtype)


def _prints(tensor: Tensor) -> Iterable[str]:
    array = bits(tensor)
    return {content(array), content(transposed(array))}


def match(twin: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, str]:
    """Checkpoint name to state name, by content; of tied state tensors the equal name, or the
    first."""
    places: dict[str, list[str]] = {}
    for place, tensor in state.items():
        places.setdefault(content_of(tensor), []).append(place)
    matched = {}
    for name, tensor in twin.items():
        candidates = places.get(content_of(tensor), [])
        if candidates:
            matched[name] = name if name in candidates else candidates[0]
    return matched


def unfilled(module: nn.Module, names: Mapping[str, str]) -> tuple[str, ...]:
    """State names of the floating tensors that none of `names` reaches, not even through a tie."""
    state = module.state_dict()
    filled = {memory_of(state[place]) for place in names.values()}
    return tuple(
        place
        for place, tensor in state.items()
        if tensor.is_floating_point() and tensor.numel() and memory_of(tensor) not in filled
    )
