"""Checkpoint activations: keep the inputs of a model's blocks, and compute the rest a second time.

A step keeps every layer's activations for its backward pass. With the blocks of a model (its
encoder or decoder layers) checkpointed, it keeps each block's input and computes the block again
when its gradient is due: a third more time for a fraction of the memory, and the same gradient
(Chen et al., arXiv 1604.06174). transformers has this for training mode only, in which dropout is
on; here it is for any module that repeats its blocks, in any mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kilodelta.errors import InputError


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """List the blocks that a module repeats: members of one class of its outermost lists.

    Example:
        >>> blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(3))
        >>> len(blocks_of(nn.Sequential(nn.Linear(2, 2), *blocks))), len(blocks_of(blocks))
        (0, 3)
    """
    if isinstance(module, nn.ModuleList) and _repeats(module):
        return list(module)
    return [block for child in module.children() for block in blocks_of(child)]


def _repeats(blocks: nn.ModuleList) -> bool:
    """Return whether a list holds two or more blocks of one class that have parameters."""
    kinds = {type(block) for block in blocks}
    whole = all(next(block.parameters(), None) is not None for block in blocks)
    return len(blocks) > 1 and len(kinds) == 1 and whole


@contextmanager
def checkpointed(module: nn.Module) -> Iterator[None]:
    """Checkpoint the activations of a module's blocks in this block of code.

    Args:
        module: what is trained; where it is attached to a delta, now or later, does not matter.

    Raises:
        InputError: it repeats no blocks.
    """
    blocks = list(dict.fromkeys(blocks_of(module)))  # a shared one is listed twice
    if not blocks:
        raise InputError(
            f"{type(module).__name__} has no list of blocks of one class, so its activations"
            " cannot be checkpointed",
            fix="leave --gradient-checkpointing away, and give a smaller --batch",
        )
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(_checkpointed_block(block))
        yield


@contextmanager
def _checkpointed_block(block: nn.Module) -> Iterator[None]:
    before = block.__dict__.get("forward")
    # An attribute of the instance hides the method of the class.
    block.__dict__["forward"] = partial(_forward, block.forward)
    try:
        yield
    finally:
        del block.__dict__["forward"]
        if before is not None:
            block.__dict__["forward"] = before


def _forward(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
