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
BLOCK = 1 << 20
"""Elements fingerprinted at a time."""


def content(array: npt.NDArray[Any]) -> str:
    """Fingerprint a tensor: its shape and bytes."""
    state = hashlib.sha256(repr(array.shape).encode())
    state.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return state.hexdigest()


def content_of(tensor: Tensor) -> str:
    """Fingerprint a torch tensor of any dtype as `content` does; bfloat16 by its bits.

    Some rows are read at a time: the tensor may lie in less memory than its elements would take.
    """
    state = hashlib.sha256(repr(tuple(tensor.shape)).encode())
    whole = tensor.detach()
    parts = [whole] if whole.dim() == 0 or not whole.numel() else _some_rows(whole)
    for part in parts:
        state.update(bits(part).reshape(-1).view(np.uint8).data)
    return state.hexdigest()


def _some_rows(tensor: Tensor) -> Iterable[Tensor]:
    return torch.split(tensor, max(1, BLOCK * len(tensor) // tensor.numel()))


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


def unique_views(specs: Mapping[str, Spec]) -> dict[str, Tensor]:
    """Make what `unique` does in little memory: each tensor is a view of a short random line.

    Row i begins 2 i elements into the line and overlaps the row before, so n rows of m elements
    lie in m + 2 n. No two rows are alike, and no matrix is its own transpose. The views can be
    read and hashed as any tensor, and not be written into.

    Example:
        >>> view = unique_views({"w": ((1000, 1000), torch.float32)})["w"]
        >>> view.shape, view.untyped_storage().nbytes()
        (torch.Size([1000, 1000]), 11992)
    """
    lines = {name: ((_line(shape),), dtype) for name, (shape, dtype) in specs.items()}
    generator = torch.Generator().manual_seed(0)
    seen: set[str] = set()
    values = {}
    for name, spec in sorted(lines.items(), key=lambda item: _size(item[1])):
        shape = specs[name][0]
        values[name] = _fresh(*spec, generator, seen, shape)
        seen.update(_prints(values[name]))
    return values


def _line(shape: tuple[int, ...]) -> int:
    """Count the elements that the views of a shape need."""
    size = _size((shape, torch.bool))
    return size // shape[0] + 2 * (shape[0] - 1) if size and len(shape) > 1 else size


def _as_view(line: Tensor, shape: tuple[int, ...]) -> Tensor:
    if len(shape) < 2 or not line.numel():
        return line.reshape(shape)
    strides = [1]
    for extent in reversed(shape[2:]):
        strides.insert(0, strides[0] * extent)
    return line.as_strided(shape, (2, *strides))


def _size(spec: Spec) -> int:
    return int(np.prod(spec[0], dtype=np.int64))


def _fresh(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    generator: torch.Generator,
    seen: set[str],
    viewed: tuple[int, ...] | None = None,
) -> Tensor:
    """Draw a tensor until it is like none before; `viewed` is the shape of a view of it."""
    for attempt in range(1000):
        tensor = _draw(shape, dtype, generator, attempt)
        tensor = tensor if viewed is None else _as_view(tensor, viewed)
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
    turned = tensor.t() if tensor.dim() == 2 else tensor
    return {content_of(tensor), content_of(turned)}


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


def computed(module: nn.Module, names: Mapping[str, str]) -> tuple[str, ...]:
    """Return the state names that no file holds since their class computes and never saves them.

    Marian's sinusoidal positions are such; transformers lists them as `_keys_to_ignore_on_save`.
    """
    unsaved = getattr(module, "_keys_to_ignore_on_save", None) or ()
    return tuple(place for place in unfilled(module, names) if place in unsaved)


def unfilled(module: nn.Module, names: Mapping[str, str]) -> tuple[str, ...]:
    """State names of the floating tensors that none of `names` reaches, not even through a tie."""
    state = module.state_dict()
    filled = {memory_of(state[place]) for place in names.values()}
    return tuple(
        place
        for place, tensor in state.items()
        if tensor.is_floating_point() and tensor.numel() and memory_of(tensor) not in filled
    )
