"""Compute a model in float64 block by block: one block's weights at a time are as wide.

The reference needs every weight in float64, twice or four times the bytes that the model takes in
memory. A model that repeats blocks (its encoder or decoder layers) computes them one after another,
so the weights of a block are widened when it is entered and forgotten when it is left. Widening
rounds nothing: outputs are, bit for bit, those of the model in float64 as a whole.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kilodelta.compress.training.activations import blocks_of

LARGE = 256 << 20
"""Bytes of float64 weights from which they are widened block by block; below, once for all."""
WIDE = torch.float64


def is_large(module: nn.Module) -> bool:
    """Return whether a module's weights in float64 are worth widening block by block."""
    return _wide_bytes([module]) > LARGE and bool(blocks_of(module))


def needed(module: nn.Module) -> int:
    """Return the bytes that a module's weights take in float64 while it computes.

    Example:
        >>> needed(nn.Linear(4, 2))
        80
    """
    whole = _wide_bytes([module])
    if not is_large(module):
        return whole
    blocks = blocks_of(module)
    inside = {tensor for block in blocks for tensor in _floats(block)}
    outside = sum(8 * t.numel() for t in _floats(module) if t not in inside)
    return outside + max(_wide_bytes([block]) for block in blocks)


def widened(module: nn.Module) -> nn.Module:
    """Return a copy that computes in float64 and shares the weights of the blocks with `module`.

    Args:
        module: on a CPU; it is left as it is, and must stay as it is while the copy is used.
    """
    tensors = (*module.parameters(), *module.buffers())
    shared: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    made = copy.deepcopy(module, shared)
    blocks = list(dict.fromkeys(blocks_of(made)))
    inside = {part for block in blocks for part in block.modules()}
    _Block([part for part in made.modules() if part not in inside]).widen()
    for block in blocks:
        parts = _Block(list(block.modules()))
        block.register_forward_pre_hook(parts.on_enter, prepend=True)
        # Also where the block raises, or the copy would keep this block's weights for ever.
        block.register_forward_hook(parts.on_leave, always_call=True)
    return made


class _Block:
    """Modules whose own tensors are widened and given back together."""

    def __init__(self, parts: list[nn.Module]) -> None:
        self.parts = parts
        self.narrow: list[tuple[dict[str, Any], str, Tensor]] = []

    def on_enter(self, block: nn.Module, given: Any) -> None:
        self.widen()

    def on_leave(self, block: nn.Module, given: Any, result: Any) -> None:
        for tensors, name, tensor in self.narrow:
            tensors[name] = tensor
        self.narrow.clear()

    def widen(self) -> None:
        """Put float64 copies in the tensors' places; tied ones get one copy."""
        made: dict[int, Tensor] = {}
        for part in self.parts:
            kinds: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
            for tensors in kinds:
                for name, tensor in tensors.items():
                    if tensor is None or not tensor.is_floating_point() or tensor.dtype == WIDE:
                        continue
                    if id(tensor) not in made:
                        made[id(tensor)] = _wide(tensor)
                    self.narrow.append((tensors, name, tensor))
        for places, name, tensor in self.narrow:
            places[name] = made[id(tensor)]


def _wide(tensor: Tensor) -> Tensor:
    wide = tensor.detach().to(WIDE)
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(wide, requires_grad=False) if is_parameter else wide


def _floats(module: nn.Module) -> Iterable[Tensor]:
    return (p for p in module.parameters() if p.is_floating_point())


def _wide_bytes(modules: Iterable[nn.Module]) -> int:
    return sum(8 * tensor.numel() for module in modules for tensor in _floats(module))
