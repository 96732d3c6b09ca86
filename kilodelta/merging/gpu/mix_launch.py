"""Launch the training kernels: sums of sign bases for many targets, and their gradient."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from kilodelta.exact.bases import BLOCK
from kilodelta.merging.gpu import variants
from kilodelta.merging.gpu.on_triton import key, tiles

PARTS = 64
"""Most parts into which a gradient's sum is cut, so that few targets keep a GPU busy as well."""

TYPES = {torch.float32: "fp32", torch.float64: "fp64"}


@lru_cache(maxsize=64)
def _layout(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (starts int64, sizes int32) of the targets in the flat factor."""
    counts = torch.tensor(sizes)
    starts = counts.cumsum(0) - counts
    return starts.to(device), counts.int().to(device)


def mix(coefficients: Tensor, sizes: Sequence[int], place: Sequence[int]) -> Tensor:
    """Compute the sums of all targets, one after the other.

    Args:
        coefficients: float32 or float64 (targets, bases).
        sizes: elements of each target, ascending.
        place: seed, role, rank, and 1 where the bases' rows are the factor's lines.
    """
    seed, role, rank, rows = place
    out = coefficients.new_empty(sum(sizes))
    padded = pad(coefficients, (0, -coefficients.shape[1] % BLOCK)).contiguous()
    variant = variants.FORWARD[rows == 1, TYPES[out.dtype]]
    grid = (
        tiles(sizes[-1], variant.constants["BE"]),
        tiles(len(sizes), variant.constants["BT"]),
    )
    before = out, padded, *_layout(tuple(sizes), out.device), *key(seed), role
    variant.launch(grid, *before, len(sizes), sizes[-1], rank, padded.shape[1] // BLOCK)
    return out


def mix_backward(
    gradient: Tensor, bases: int, sizes: Sequence[int], place: Sequence[int]
) -> Tensor:
    """Compute the gradient to the coefficients, (targets, bases).

    Args:
        gradient: to the sums, as `mix` returns them.
        bases: how many.
        sizes, place: as for `mix`.
    """
    seed, role, rank, rows = place
    blocks, count, largest = tiles(bases, BLOCK), len(sizes), sizes[-1]
    variant = variants.BACKWARD[rows == 1, TYPES[gradient.dtype]]
    tile = variant.constants["BE"]
    wanted = max(1, min(PARTS, largest // (blocks * BLOCK)))  # no more memory than the factors
    step = tiles(tiles(largest, wanted), tile) * tile
    parts = tiles(largest, step)
    out = gradient.new_empty(parts, count, blocks * BLOCK)
    grid = blocks, parts, tiles(count, variant.constants["BT"])
    before = out, gradient, *_layout(tuple(sizes), out.device), *key(seed), role, step
    variant.launch(grid, *before, count, largest, rank, blocks)
    return out.sum(0)[:, :bases]
