"""Keep sign bases as bits, and sum them, weighted, for many targets at once.

All targets share the bases of a role (docs/format.md, section 5), so one packed copy serves them:
basis i of a role is bit i of every element, and a target uses the first lines. A sum over k bases
is a matrix product with the unpacked bits, done a few million signs at a time, in the forward and
in the backward pass, so that nothing of size k times a layer is ever kept.

On a GPU with Triton no bits are kept: `kilodelta.merging.gpu` draws them in both passes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kilodelta.exact.bases import BLOCK, Stream

SIGNS_A_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 25}
"""Signs unpacked at a time: few MB of float32, so as to stay in a core's cache; more for a GPU."""


class PerDevice:
    """A constant that is drawn on the CPU when first used, and kept once per device."""

    def __init__(self, draw: Callable[[], Tensor]) -> None:
        self._draw = draw
        self._copies: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """Return the constant on a device."""
        if device not in self._copies:
            cpu = torch.device("cpu")
            # Philox runs on the CPU, so that every device trains on the same bases.
            self._copies.setdefault(cpu, self._draw())
            self._copies[device] = self._copies[cpu].to(device)
        return self._copies[device]


def pack(
    stream: Stream, role: int, *, lines: int, rank: int, bases: int, lines_are_rows: bool
) -> Tensor:
    """Pack sign bases 0 .. bases-1 of a role: uint8 (lines * rank, ceil(bases / 8)).

    Args:
        stream: of the seed.
        role: of the bases.
        lines: the most that a target uses.
        rank: entries of each line.
        bases: how many.
        lines_are_rows: whether a line is a row of each basis, or a column.

    Element (line, rho) is the basis entry at (row, column) = (line, rho) where lines are rows,
    else at (rho, line). Bit i mod 8 of byte i div 8 is basis i; 0 is +1, 1 is -1.
    """
    place = (range(lines), range(rank)) if lines_are_rows else (range(rank), range(lines))
    words = stream.words(role, *place, range(-(-bases // BLOCK)))
    ordered = words if lines_are_rows else words.swapaxes(0, 1)
    # Little-endian words, so that bit i mod 8 of byte i div 8 is basis i on any machine.
    as_bytes = np.ascontiguousarray(ordered).astype("<u4", copy=False).view(np.uint8)
    return torch.from_numpy(as_bytes.reshape(lines * rank, -1)[:, : -(-bases // 8)].copy())


class SignBases(PerDevice):
    """The sign bases of a role: their bits on a device, or none where kernels draw them there."""

    def __init__(
        self,
        stream: Stream,
        role: int,
        *,
        lines: int,
        rank: int,
        bases: int,
        lines_are_rows: bool,
    ) -> None:
        shape = {"lines": lines, "rank": rank, "bases": bases}
        super().__init__(partial(pack, stream, role, **shape, lines_are_rows=lines_are_rows))
        self.place = (stream.seed, role, rank, int(lines_are_rows))
        self._bytes = -(-bases // 8)

    def on(self, device: torch.device) -> Tensor:
        """Return the bits, uint8 (elements, bytes), or (0, bytes) where kernels draw them."""
        if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
            return torch.empty(0, self._bytes, dtype=torch.uint8, device=device)
        return super().on(device)


@lru_cache(maxsize=8)
def _signs_of_byte(device: torch.device) -> Tensor:
    """Return the signs of the eight bits of each byte, float32 (256, 8)."""
    bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    return (1 - 2 * bits).to(device, torch.float32)


def unpack(packed: Tensor) -> Tensor:
    """Unpack signs to float32 (elements, 8 * bytes)."""
    table = _signs_of_byte(packed.device)
    return table.index_select(0, packed.reshape(-1).int()).view(packed.shape[0], -1)


def _classes(sizes: Sequence[int]) -> list[tuple[slice, slice, int]]:
    """Find runs of equal sizes: their targets, their place in the flat result, the size."""
    runs: list[tuple[slice, slice, int]] = []
    first = place = 0
    while first < len(sizes):
        size = sizes[first]
        count = sum(1 for s in sizes[first:] if s == size)
        runs.append((slice(first, first + count), slice(place, place + count * size), size))
        first, place = first + count, place + count * size
    return runs


def _chunks(packed: Tensor, sizes: Sequence[int]) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the elements, none across the end of a target, with their signs."""
    budget = SIGNS_A_CHUNK.get(packed.device.type, SIGNS_A_CHUNK["cuda"])
    step = max(1, budget // (8 * packed.shape[1]))
    start = 0
    for end in sorted(set(sizes)):
        for begin in range(start, end, step):
            piece = slice(begin, min(begin + step, end))
            yield piece, unpack(packed[piece])
        start = end


@torch.library.custom_op(
    "kilodelta::mix_signs",
    mutates_args=(),
    schema="(Tensor coefficients, Tensor packed, int[] sizes, str place) -> Tensor",
)
def mix_signs(coefficients: Tensor, packed: Tensor, sizes: Sequence[int], place: str) -> Tensor:
    """Compute, for target t, the sums sum_i coefficients[t, i] S_i[element], element < sizes[t].

    Args:
        coefficients: float32 (targets, 8 * bytes), columns beyond the last basis zero.
        packed: uint8 (elements, bytes), of `pack`. Without elements, a kernel draws the signs from
            `place`; then coefficients may also be float64.
        sizes: elements of each target, ascending.
        place: seed, role, rank, and 1 where lines are rows; as text, because a seed is unsigned.

    Returns:
        float32, the targets' sums one behind the other.
    """
    if not packed.shape[0]:
        from kilodelta.merging.gpu.mix_launch import mix

        return mix(coefficients, sizes, _numbers(place))
    # autocast would sum thousands of terms in half precision and lose the small coefficients.
    flat = coefficients.new_empty(sum(sizes))
    classes = _classes(sizes)
    with torch.autocast(packed.device.type, enabled=False):
        for piece, signs in _chunks(packed, sizes):
            for targets, span, size in classes:
                if piece.start < size:
                    sums = flat[span].view(-1, size)
                    sums[:, piece] = coefficients[targets] @ signs.t()
    return flat


@torch.library.custom_op(
    "kilodelta::mix_signs_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor packed, int[] sizes, str place) -> Tensor",
)
def mix_signs_backward(
    gradient: Tensor, packed: Tensor, sizes: Sequence[int], place: str
) -> Tensor:
    """Compute the gradient of `mix_signs` to its coefficients: float32 (targets, 8 * bytes).

    Args:
        gradient: to the sums, as `mix_signs` returns them.
        packed, sizes, place: as for `mix_signs`.
    """
    if not packed.shape[0]:
        from kilodelta.merging.gpu.mix_launch import mix_backward

        return mix_backward(gradient, 8 * packed.shape[1], sizes, _numbers(place))
    total = gradient.new_zeros(len(sizes), 8 * packed.shape[1])
    classes = _classes(sizes)
    with torch.autocast(packed.device.type, enabled=False):
        for piece, signs in _chunks(packed, sizes):
            for targets, span, size in classes:
                if piece.start < size:
                    total[targets] += gradient[span].view(-1, size)[:, piece] @ signs
    return total


def _numbers(place: str) -> list[int]:
    return [int(number) for number in place.split()]


@mix_signs.register_fake
def _(coefficients: Tensor, packed: Tensor, sizes: Sequence[int], place: str) -> Tensor:
    return coefficients.new_empty(sum(sizes))


@mix_signs_backward.register_fake
def _(gradient: Tensor, packed: Tensor, sizes: Sequence[int], place: str) -> Tensor:
    return gradient.new_empty(len(sizes), 8 * packed.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, list[int], str], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    _, _, ctx.sizes, ctx.place = inputs


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    (packed,) = ctx.saved_tensors
    to_coefficients = mix_signs_backward(gradient.contiguous(), packed, ctx.sizes, ctx.place)
    return to_coefficients, None, None, None


mix_signs.register_autograd(_backward, setup_context=_keep)


class SignMixer:
    """Sums a role's bases, weighted, for a fixed list of targets, as one product."""

    def __init__(self, bases: SignBases, lines: Sequence[int], rank: int) -> None:
        self.bases = bases
        self._place = " ".join(map(str, bases.place))
        self._rank = rank
        self._order = sorted(range(len(lines)), key=lambda t: lines[t])
        self._sizes = [lines[t] * rank for t in self._order]
        starts = np.cumsum([0, *self._sizes[:-1]]).tolist()  # a compiler traces int, not np.int64
        self._starts: dict[int, int] = dict(zip(self._order, starts, strict=True))
        self._lines = tuple(lines)

    def mix(self, coefficients: Sequence[Tensor]) -> Tensor:
        """Compute all targets' sums in one flat tensor, from one tensor (k,) per target."""
        stacked = torch.stack([coefficients[t] for t in self._order]).float()
        packed = self.bases.on(stacked.device)
        padding = 8 * packed.shape[1] - stacked.shape[1]
        padded = torch.nn.functional.pad(stacked, (0, padding))
        mixed: Tensor = mix_signs(padded, packed, self._sizes, self._place)
        return mixed

    def part(self, flat: Tensor, target: int) -> Tensor:
        """Return a target's sums (lines, rank), a view of what `mix` returned."""
        begin, count = self._starts[target], self._lines[target]
        return flat[begin : begin + count * self._rank].view(count, self._rank)
