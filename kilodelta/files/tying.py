"""Which tensors of a model in memory are tied: several names for one tensor.

Two names are tied when their tensors start at the same address and have the same type, shape and
strides. A transposed or shorter view of the same memory is a separate tensor: files store its
values separately.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


def memory_of(value: Any) -> Hashable:
    """Return a key that is equal for two torch tensors, or two numpy arrays, that are tied.

    A tensor without elements occupies no memory and is tied to itself only.

    Example:
        >>> square = np.zeros((2, 2))
        >>> memory_of(square) == memory_of(square[:]), memory_of(square) == memory_of(square.T)
        (True, False)
    """
    if isinstance(value, np.ndarray):
        place: Any = value.__array_interface__["data"][0]
        size, strides, dtype = value.size, value.strides, value.dtype.str
    elif hasattr(value, "to_local"):  # sharded among processes: by the part that is held here
        return memory_of(value.to_local())
    elif hasattr(value, "data_ptr") and str(value.layout) == "torch.strided":
        place, size, strides = value.data_ptr(), value.numel(), value.stride()
        dtype = str(value.dtype)
        if value.is_meta:  # without data, all begin at address 0
            place = ("meta", value.untyped_storage()._cdata, value.storage_offset())
    else:
        return ("object", id(value))
    if not size:
        return ("object", id(value))
    shape = tuple(value.shape)
    # The stride of an axis of length one moves nothing, and libraries set it differently.
    steps = tuple(step if extent > 1 else 0 for step, extent in zip(strides, shape, strict=True))
    return (place, dtype, shape, steps)


def first_names(tensors: Mapping[str, Any]) -> dict[str, str]:
    """Map every name to the first name of the same tensor, in the mapping's order.

    Example:
        >>> word = np.ones(3)
        >>> first_names({"embed": word, "bias": np.ones(3), "head": word})
        {'embed': 'embed', 'bias': 'bias', 'head': 'embed'}
    """
    first: dict[Hashable, str] = {}
    return {name: first.setdefault(memory_of(value), name) for name, value in tensors.items()}


def untied(tensors: Mapping[str, T]) -> dict[str, T]:
    """Keep each tensor once, under its first name in the mapping's order."""
    return {name: tensors[name] for name, first in first_names(tensors).items() if name == first}


def tied(tensors: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of tensors that have more than one name."""
    firsts = first_names(tensors)
    again = {first for name, first in firsts.items() if name != first}
    return frozenset(name for name, first in firsts.items() if first in again)


def file_order(model: Any, names: Iterable[str]) -> list[str]:
    """Sort names so that of tied ones the one that the model's own files keep comes first.

    transformers declares the others in `_tied_weights_keys`; where nothing is declared, the name
    that sorts first by UTF-8 bytes counts (docs/format.md, section 4).
    """
    copies = frozenset(getattr(model, "_tied_weights_keys", None) or ())
    return sorted(names, key=lambda name: (name in copies, name.encode("utf-8")))
