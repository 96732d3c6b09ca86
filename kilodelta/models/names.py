"""Which checkpoint tensor is which of a module's tensors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from kilodelta.files.tying import memory_of
from kilodelta.models.twin import content_of


def match(twin: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, str]:
    """Checkpoint name to state name, by content; of tied state tensors the equal name, or the
    first."""
    places: dict[str, list[str]] = {}
    for place, tensor in state.items():
        places.setdefault(content_of(tensor), []).append(place)
    found = {}
    for name, tensor in twin.items():
        there = places.get(content_of(tensor), [])
        if there:
            found[name] = name if name in there else there[0]
    return found


def unfilled(module: nn.Module, names: Mapping[str, str]) -> tuple[str, ...]:
    """State names of the floating tensors that none of `names` reaches, not even through a tie."""
    state = module.state_dict()
    filled = {memory_of(state[place]) for place in names.values()}
    return tuple(
        place
        for place, tensor in state.items()
        if tensor.is_floating_point() and tensor.numel() and memory_of(tensor) not in filled
    )
