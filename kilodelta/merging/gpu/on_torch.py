"""Draw factors and multiply them by torch operations, for GPUs without Triton, and for CPUs.

Integers up to 2^53 are exact in float64 and their sums in any order too, so a float64 product is
an integer product. Words are int64 numbers of 32 bits, multiplied in halves of 16 bits.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kilodelta.exact.bases import BLOCK, Ints
from kilodelta.merging.gpu.unit import Bases, Draw, Unit, UpdateScale

MASK = 0xFFFFFFFF


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Return the (high, low) words of a product of 32-bit numbers; nothing exceeds 2^49."""
    bottom, top = (word & 0xFFFF) * factor, (word >> 16) * factor
    middle = top + (bottom >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (bottom & 0xFFFF)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, ...]:
    """Compute Philox4x32-10 (Salmon et al., SC'11): four words, int64; counters broadcast."""
    a, b, c, d = counter
    k0, k1 = seed & MASK, seed >> 32
    for _ in range(10):
        high0, low0 = _multiply(a, 0xD2511F53)
        high1, low1 = _multiply(c, 0xCD9E8D57)
        a, b, c, d = high1 ^ b ^ k0, low1, high0 ^ d ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return a, b, c, d


class TorchUnit(Unit):
    """A device by torch operations alone; low-rank factors are float64 holding integers."""

    name = "torch"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mixed(self, bases: Bases, q: Ints, rank: int) -> Draw:
        values = torch.zeros(-(-q.size // BLOCK), BLOCK, dtype=torch.float64, device=self.device)
        values.view(-1)[: q.size] = self._put(q)

        def draw(lines: range) -> Tensor:
            total = torch.zeros(rank, len(lines), dtype=torch.float64, device=self.device)
            for block, part in enumerate(values):
                for word, numbers in zip(
                    self._words(bases, lines, rank, block), part.view(4, 32), strict=True
                ):
                    total += self._bits(word) @ numbers
            return total

        return draw

    def signed(self, bases: Bases, over_rank: Ints, over_lines: Ints) -> Draw:
        ranks, all_lines = self._put(over_rank), self._put(over_lines)

        def draw(lines: range) -> Tensor:
            sizes = ranks[:, None] * all_lines[lines.start : lines.stop]
            return sizes * self._sign(self._words(bases, lines, ranks.numel(), 0)[0])

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
        values, k = self._put(theta), theta.size

        def draw(lines: range) -> Tensor:
            first, odd, _, _ = self._words(bases, lines, rank, index)
            picks = values[_multiply(first, k)[0]] * self._sign(odd)
            if anchor:
                at = Bases(stream=bases.stream, role=anchor_role, lines_are_rows=False)
                picks += anchor * self._sign(self._words(at, lines, rank, 0)[0])
            return picks

        return draw

    def held(self, factor: Ints) -> Draw:
        values = self._put(factor)
        return lambda lines: values[:, lines.start : lines.stop]

    def large(self, bases: Bases, lambda_: Ints, sparsity: int) -> Draw:
        n, rank = lambda_.shape
        values, size = self._put(lambda_).t(), 4 if sparsity else BLOCK

        def draw(lines: range) -> Tensor:
            parts = []
            for block in range(-(-n // size)):
                words = self._words(bases, lines, rank, block)
                bits = [
                    self._ternary(word, sparsity)[..., None] if sparsity else self._bits(word)
                    for word in words
                ]
                parts.append(torch.cat(bits, dim=-1))
            entries = torch.cat(parts, dim=-1)[..., :n] * values[:, None, :]
            return self._wide(entries)

        return draw

    def small(self, bases: Bases, gamma: Ints, rank: int, sparsity: int) -> Draw:
        values = self._put(gamma).t()

        def draw(lines: range) -> Tensor:
            word = self._words(bases, lines, rank, 0)[0]
            entries = self._ternary(word, sparsity) if sparsity else self._sign(word)
            return self._wide(entries[..., None] * values[lines.start : lines.stop])

        return draw

    def add(
        self, weights: Tensor, left: Tensor, right: Tensor, scale: UpdateScale
    ) -> tuple[Tensor, Tensor]:
        is_wide = left.dtype == torch.int8
        product = left.double() @ right.double().t() if is_wide else left.t() @ right
        # A product of -0.0 would keep a weight of -0.0, so + 0.0.
        number = (product * scale.c + 0.0).float()
        new = (weights.float() + number * scale.unit).to(weights.dtype)
        return new, (~torch.isfinite(new)).any().int().reshape(1)

    def _put(self, values: Ints) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, np.float64)).to(self.device)

    def _words(self, bases: Bases, lines: range, rank: int, block: int) -> tuple[Tensor, ...]:
        """Draw the four words of all entries, each int64 (rank, lines)."""
        line = torch.arange(lines.start, lines.stop, device=self.device)[None, :]
        rho = torch.arange(rank, device=self.device)[:, None]
        row, column = (line, rho) if bases.lines_are_rows else (rho, line)
        others = torch.tensor([block, bases.role], device=self.device)
        return philox((row, column, others[0], others[1]), bases.stream.seed)

    def _bits(self, word: Tensor) -> Tensor:
        """Return the signs of the 32 bits of each word, float64 (..., 32)."""
        lanes = torch.arange(32, device=self.device)
        return 1.0 - 2.0 * ((word[..., None] >> lanes) & 1).double()

    @staticmethod
    def _sign(word: Tensor) -> Tensor:
        return 1.0 - 2.0 * (word & 1).double()

    @staticmethod
    def _ternary(word: Tensor, sparsity: int) -> Tensor:
        edge = 2**32 // (2 * sparsity)
        return (word >= 2**32 - edge).double() - (word < edge).double()

    @staticmethod
    def _wide(entries: Tensor) -> Tensor:
        """Turn (rank, lines, n) into the factor int8 (lines, rank n)."""
        return entries.permute(1, 0, 2).reshape(entries.shape[1], -1).to(torch.int8)
