"""Draw random bases by coordinates: any slice, in any order, gives the same integers.

docs/format.md, section 5. A `Stream` is one delta's seed; its methods draw slices of the bases of a
role, the number that keeps the random matrices of all methods apart. They run on the kernels of
`kilodelta.exact.philox`, which are loaded at the first draw.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[Any]

BLOCK = 128
"""Sign bases that one Philox call serves."""
KERNEL_SUM = 1 << 32
"""The kernel's sums of magnitudes are 32 bits wide. Coefficients that could exceed them are mixed
byte by byte: 2^24 bases (the most) times 2^8 just fit."""


def _philox() -> ModuleType:
    """Load the kernels: numba comes with them, so they wait for the first draw."""
    from kilodelta.exact import philox

    return philox


def _u32(*numbers: int) -> tuple[np.uint32, ...]:
    return tuple(np.uint32(number) for number in numbers)


@dataclass(frozen=True)
class Stream:
    """All random bases of one 64-bit seed.

    Example:
        >>> Stream(1).sign(0, 0, range(2), range(3)).tolist()
        [[1, 1, 1], [-1, -1, -1]]
    """

    seed: int

    @property
    def key(self) -> tuple[np.uint32, ...]:
        """The key of Philox: low word, high word."""
        return _u32(self.seed & 0xFFFFFFFF, self.seed >> 32)

    def words(self, role: int, rows: range, columns: range, blocks: range) -> Ints:
        """Draw raw words, uint32 (rows, columns, blocks, 4): sign bases as bits, 128 per block.

        Args:
            role: of the bases.
            rows, columns, blocks: the box of coordinates.
        """
        out = np.empty((len(rows), len(columns), len(blocks), 4), np.uint32)
        place = _u32(role, rows.start, columns.start, blocks.start)
        _philox().draw(*self.key, *place, out)
        return out

    def mix(self, role: int, coefficients: Ints, rows: range, columns: range) -> Ints:
        """Compute sum_i q_i S_i over sign bases, int64 (rows, columns).

        Args:
            role: of the bases.
            coefficients: q, integers (k,).
            rows, columns: the slice of each basis.
        """
        mixed: Ints = self.mix_many(role, coefficients[None], rows, columns)[0]
        return mixed

    def mix_many(self, role: int, coefficients: Ints, rows: range, columns: range) -> Ints:
        """Compute `mix` for each line of (n, k), each basis drawn once: int64 (n, rows, columns).

        Args:
            role: of the bases.
            coefficients: integers (n, k).
            rows, columns: the slice of each basis.
        """
        totals = np.abs(coefficients.astype(np.int64)).sum(axis=1)
        if int(totals.max(initial=0)) >= KERNEL_SUM:
            # q = low + 256 high with low in 0 .. 255, of negative q as well (two's complement).
            low = (coefficients.astype(np.int32) & 255).astype(np.int16)
            high = ((coefficients - low) >> 8).astype(np.int16)
            by_bytes: Ints = self.mix_many(role, low, rows, columns)
            by_bytes += 256 * self.mix_many(role, high, rows, columns)
            return by_bytes
        out = np.empty((len(coefficients), len(rows), len(columns)), np.int64)
        planes, flips = _bit_planes(coefficients)
        place = _u32(role, rows.start, columns.start)
        _philox().mix(*self.key, *place, planes, flips, totals, out)
        return out

    def signs(self, role: int, values: Ints, rows: range, columns: range) -> Ints:
        """Draw values[j, column] S_j[row, column] for sign bases j: (rows, columns, n).

        Args:
            role: of the bases.
            values: signed integers (n, width), wide enough for every column asked for; the result
                has their type.
            rows, columns: the slice of each basis.
        """
        out = np.empty((len(rows), len(columns), values.shape[0]), values.dtype)
        place = _u32(role, rows.start, columns.start)
        _philox().signs(*self.key, *place, np.ascontiguousarray(values), out)
        return out

    def ternary(self, role: int, sparsity: int, values: Ints, rows: range, columns: range) -> Ints:
        """Draw what `signs` draws, for ternary bases: (rows, columns, n).

        Args:
            role: of the bases.
            sparsity: one entry in so many is not zero.
            values: signed integers (n, width).
            rows, columns: the slice of each basis.
        """
        out = np.empty((len(rows), len(columns), values.shape[0]), values.dtype)
        place = _u32(role, rows.start, columns.start)
        _philox().ternary(*self.key, *place, sparsity, np.ascontiguousarray(values), out)
        return out

    def sign(self, role: int, base: int, rows: range, columns: range) -> Ints:
        """Draw one sign basis itself, int8 (rows, columns) of -1 and +1.

        Args:
            role: of the basis.
            base: its number.
            rows, columns: the slice of it.
        """
        block, bit = divmod(base, BLOCK)
        words = self.words(role, rows, columns, range(block, block + 1))
        drawn = (words[:, :, 0, bit // 32] >> np.uint32(bit % 32)) & np.uint32(1)
        return (1 - 2 * drawn.astype(np.int8)).astype(np.int8)

    def pick(self, role: int, target: int, theta: Ints, rows: range, columns: range) -> Ints:
        """Draw signed picks from a vector (Uni-LoRA), of the vector's type: (rows, columns).

        Args:
            role: of the picks.
            target: the target's position among the targets; each has separate picks.
            theta: the vector (k,).
            rows, columns: the slice of the target's factor.
        """
        out = np.empty((len(rows), len(columns)), theta.dtype)
        place = _u32(role, rows.start, columns.start, target)
        _philox().pick(*self.key, *place, np.ascontiguousarray(theta), out)
        return out


def bit_planes(coefficients: Ints) -> tuple[Ints, Ints]:
    """Split (k,) into bit planes of magnitudes, uint32 (P, blocks, 4), and of signs (blocks, 4)."""
    planes, flips = _bit_planes(coefficients[None])
    return planes[0], flips[0]


def _bit_planes(coefficients: Ints) -> tuple[Ints, Ints]:
    """Split each line of (n, k): (n, P, blocks, 4) and (n, blocks, 4)."""
    n, k = coefficients.shape
    padded = np.zeros((n, -(-k // BLOCK) * BLOCK), np.int64)
    padded[:, :k] = coefficients
    sizes = np.abs(padded)
    count = int(sizes.max(initial=0)).bit_length()
    bits = np.empty((n, count + 1, padded.shape[1]), np.uint8)
    bits[:, :count] = (sizes[:, None] >> np.arange(count)[:, None]) & 1
    bits[:, count] = padded < 0
    # Little-endian bits and words: basis i is bit i mod 128 of block i div 128 on any machine.
    words = np.packbits(bits, axis=2, bitorder="little").view("<u4").astype(np.uint32)
    stacked = words.reshape(n, count + 1, -1, 4)
    return np.ascontiguousarray(stacked[:, :count]), np.ascontiguousarray(stacked[:, count])
