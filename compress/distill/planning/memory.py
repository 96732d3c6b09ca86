"""Measure memory: what a device or the machine has left, and what a pass keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kilodelta import memory
from kilodelta.models.weights import local


@dataclass
class Kept:
    """What a forward pass keeps for the backward pass.

    Attributes:
        nbytes: bytes of all tensors kept, each memory counted once; parameters not.
        largest: bytes of the largest of them.
    """

    nbytes: int = 0
    largest: int = 0
    places: set[int] = field(default_factory=set)


@contextmanager
def counting_kept(module: torch.nn.Module) -> Iterator[Kept]:
    """Count the bytes that passes in this block keep for their backward pass.

    Args:
        module: its parameters and buffers are there anyway, and are not counted.
    """
    kept = Kept()
    tensors = [*module.parameters(), *module.buffers()]
    own = {local(tensor).untyped_storage().data_ptr() for tensor in tensors}

    def count(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own and place not in kept.places:
            kept.places.add(place)
            size = tensor.untyped_storage().nbytes()
            kept.nbytes += size
            kept.largest = max(kept.largest, size)
        # A node that keeps its own output (exp, softmax, attention) would hold itself through the
        # tensor as it is, and no collector sees such a cycle: the graph would stay for ever.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        yield kept


def available(device: torch.device | None = None) -> int | None:
    """Return the bytes that can still be taken, or None where the system does not say.

    Args:
        device: a GPU; by default the memory of the machine or its container.
    """
    if device is not None and device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return memory.stated()
