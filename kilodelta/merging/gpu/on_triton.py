"""Draw factors and multiply them by the Triton kernels, on the current CUDA stream.

Under `TRITON_INTERPRET=1` the same code runs on CPU tensors, slowly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kilodelta.exact.bases import BLOCK, Ints, bit_planes
from kilodelta.merging.gpu import variants
from kilodelta.merging.gpu.unit import DTYPES, Bases, Draw, Unit, UpdateScale


def word(value: int) -> int:
    """Return a 32-bit word as the signed number that a kernel takes."""
    return value - (1 << 32) if value >= 1 << 31 else value


def key(seed: int) -> tuple[int, int]:
    """Return a seed's two words, low first, as kernels take them."""
    return word(seed & 0xFFFFFFFF), word(seed >> 32)


def tiles(count: int, tile: int) -> int:
    """Return how many programs `count` entries take."""
    return -(-count // tile)


class TritonUnit(Unit):
    """A device by Triton kernels; factors are int32 (rank, lines) or int8 (lines, width)."""

    name = "triton"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mixed(self, bases: Bases, q: Ints, rank: int) -> Draw:
        planes, flips = (self._put(bits.view(np.int32)) for bits in bit_planes(q))
        total = int(np.abs(q.astype(np.int64)).sum())
        variant = variants.MIXED[bases.lines_are_rows]

        def draw(lines: range) -> Tensor:
            out = self._new(rank, len(lines))
            sizes = len(lines), rank, planes.shape[1], planes.shape[0]
            before = out, planes, flips, total, *key(bases.stream.seed), bases.role, lines.start
            variant.launch(_flat(out), *before, *sizes)
            return out

        return draw

    def signed(self, bases: Bases, over_rank: Ints, over_lines: Ints) -> Draw:
        ranks, all_lines = self._put(over_rank), self._put(over_lines)
        variant = variants.SIGNED[bases.lines_are_rows]

        def draw(lines: range) -> Tensor:
            out = self._new(ranks.numel(), len(lines))
            where = *key(bases.stream.seed), bases.role, lines.start
            variant.launch(_flat(out), out, ranks, all_lines, *where, len(lines), ranks.numel())
            return out

        return draw

    def picked(
        self,
        bases: Bases,
        theta: Ints,
        index: int,
        rank: int,
        *,
        anchor: int = 0,
        anchor_role: int = 0,
    ) -> Draw:
        values = self._put(theta)
        variant = variants.PICKED[bases.lines_are_rows, anchor != 0]

        def draw(lines: range) -> Tensor:
            out = self._new(rank, len(lines))
            roles = bases.role, anchor_role
            before = out, values, theta.size, anchor, *key(bases.stream.seed), *roles, index
            variant.launch(_flat(out), *before, lines.start, len(lines), rank)
            return out

        return draw

    def held(self, factor: Ints) -> Draw:
        values = self._put(factor)
        return lambda lines: values[:, lines.start : lines.stop].contiguous()

    def large(self, bases: Bases, lambda_: Ints, sparsity: int) -> Draw:
        n, rank = lambda_.shape
        values = self._put(lambda_, np.int8)
        variant = variants.LARGE[sparsity > 0]

        def draw(lines: range) -> Tensor:
            out = self._wide(len(lines), rank * n)
            grid = tiles(len(lines), variants.LINES), rank, tiles(n, BLOCK)
            where = *key(bases.stream.seed), bases.role, lines.start, *_edges(sparsity)
            variant.launch(grid, out, values, *where, len(lines), rank, n, out.shape[1])
            return out

        return draw

    def small(self, bases: Bases, gamma: Ints, rank: int, sparsity: int) -> Draw:
        n, all_lines = gamma.shape
        values = self._put(gamma, np.int8)
        variant = variants.SMALL[sparsity > 0]

        def draw(lines: range) -> Tensor:
            out = self._wide(len(lines), rank * n)
            grid = tiles(len(lines), variants.LINES), rank, tiles(n, 32)
            where = *key(bases.stream.seed), bases.role, lines.start, *_edges(sparsity)
            variant.launch(grid, out, values, *where, len(lines), all_lines, n, out.shape[1])
            return out

        return draw

    def add(
        self, weights: Tensor, left: Tensor, right: Tensor, scale: UpdateScale
    ) -> tuple[Tensor, Tensor]:
        dtype, (rows, columns) = DTYPES[weights.dtype], weights.shape
        bits = torch.int32 if dtype == "F32" else torch.int16
        out, flag = torch.empty_like(weights), torch.zeros(1, dtype=torch.int32, device=self.device)
        before = weights.view(bits), out.view(bits), flag, left, right, rows, columns
        if left.dtype == torch.int8:
            variant, inner = variants.BY_INT8[dtype], left.shape[1]
        else:
            variant, inner = variants.LOW_RANK[dtype, scale.bound >= 2**31], left.shape[0]
        tall, broad = variant.constants["BM"], variant.constants["BN"]
        grid = (tiles(rows, tall) * tiles(columns, broad),)
        variant.launch(grid, *before, inner, scale.c, scale.unit)
        return out, flag

    def _put(self, values: Ints, dtype: type[np.signedinteger[Any]] = np.int32) -> Tensor:
        return torch.from_numpy(np.array(values, dtype, order="C")).to(self.device)

    def _new(self, rank: int, lines: int) -> Tensor:
        return torch.empty(rank, lines, dtype=torch.int32, device=self.device)

    def _wide(self, lines: int, width: int) -> Tensor:
        """Make room for RandLoRA's factor; the columns that round its width up are zero."""
        even = tiles(width, variants.WIDTH) * variants.WIDTH
        return torch.zeros(lines, even, dtype=torch.int8, device=self.device)


def _flat(out: Tensor) -> tuple[int]:
    return (tiles(out.numel(), variants.TILE),)


def _edges(sparsity: int) -> tuple[int, int]:
    """Return two words: below the first a ternary entry is -1, from the second on +1."""
    edge = 2**32 // (2 * sparsity) if sparsity else 0
    return word(edge), word(2**32 - edge if edge else 0)
