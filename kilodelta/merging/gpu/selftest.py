"""Prove a device before it merges anything.

docs/format.md, section 7. The CPU's kernels pass their golden values first; then the device must
reproduce the typed-in roundings, and merge small targets of the method at hand, in every dtype, to
the CPU's bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from kilodelta.errors import SelfTestError
from kilodelta.exact import rounding
from kilodelta.exact.bases import Ints, Stream
from kilodelta.exact.bounds import EXACT
from kilodelta.exact.selftest import ROUNDED, require_good_kernels
from kilodelta.files.dtypes import FLOATS
from kilodelta.format.methods import METHODS, Coefficients, Method
from kilodelta.format.packing import largest, storage
from kilodelta.format.targets import Target
from kilodelta.merging.gpu.sides import sides
from kilodelta.merging.gpu.unit import TORCH, Unit, UpdateScale

STREAM = Stream(0xFEDCBA9876543210)
SHAPES = ((38, 21), (21, 140))
"""A tall and a wide target; neither divides into tiles."""


def require_good_unit(unit: Unit, name: str, variant: str = "") -> None:
    """Merge small targets of a method on a unit and by the CPU's kernels, and compare.

    Args:
        unit: the device.
        name: of the method.
        variant: which of the method's kernels are tried (`Method.variant`).

    Raises:
        SelfTestError: they differ.
    """
    require_good_kernels()
    chosen = [sample for sample in METHODS[name].samples() if sample.variant == variant]
    if not chosen:
        raise SelfTestError(
            f"{name} has no sample of its variant {variant!r} to prove {unit.name} with",
            fix="merge with device cpu, and report it",
        )
    wrong = [f"rounding to {dtype}" for dtype in TORCH if not _rounds(unit, dtype)]
    wrong += [
        f"{name} in {dtype}"
        for method in chosen
        for case in _cases(method)
        for dtype in case.wrong_dtypes(unit)
    ]
    if wrong:
        raise SelfTestError(
            f"{unit.name} on {unit.device} does not reproduce the known values of {wrong[0]}",
            fix="merge with device cpu, and report this GPU with its driver and versions",
        )


def _rounds(unit: Unit, dtype: str) -> bool:
    """Add half a unit in the last place of 1 to typed-in weights, and zero to the last two."""
    bits, width = ROUNDED[dtype]
    weights = _on(unit, np.array([bits], width), dtype)
    left = unit.held(np.ones((1, 1), np.int8))(range(1))
    right = unit.held(np.array([[1, 1, 1, 0, 0]], np.int8))(range(5))
    out, flag = unit.add(
        weights, left, right, UpdateScale(c=1, e=-FLOATS[dtype].fraction_bits - 1, bound=1)
    )
    expected = [bits[0], bits[1] + 1, bits[0], bits[3], 0]
    return _bits(out).view(width).tolist() == expected and not flag.any()


def _on(unit: Unit, bits: Ints, dtype: str) -> torch.Tensor:
    signed = bits.view(np.int32 if dtype == "F32" else np.int16)
    return torch.from_numpy(signed).view(TORCH[dtype]).to(unit.device)


def _bits(weights: torch.Tensor) -> Ints:
    raw = weights.cpu().view(torch.int32 if weights.element_size() == 4 else torch.int16)
    flat: Ints = raw.numpy().reshape(-1)
    return flat


@dataclass(frozen=True, kw_only=True)
class _Case:
    method: Method
    target: Target
    q: Coefficients

    @property
    def scale(self) -> UpdateScale:
        """A scale for updates as large as the weights; C takes sums beyond float32's 24 bits."""
        bound = self.method.bound(self.q)
        c = min(255 * 255, (EXACT - 1) // bound)
        return UpdateScale(c=c, e=-(c * bound).bit_length(), bound=bound)

    def wrong_dtypes(self, unit: Unit) -> list[str]:
        """Return the types of weights for which a unit differs from the CPU."""
        rows, columns = map(range, self.target.stored)
        draws = sides(self.method, self.q, self.target, STREAM, unit).stored(self.target)
        left, right = draws[0](rows), draws[1](columns)
        wrong = []
        for dtype in TORCH:
            bits = _weights(self.target.stored, dtype)
            out, flag = unit.add(_on(unit, bits, dtype), left, right, self.scale)
            expected = self._expected(bits, dtype)
            if flag.any() or not np.array_equal(_bits(out).view(expected.dtype), expected):
                wrong.append(dtype)
        return wrong

    def _expected(self, bits: Ints, dtype: str) -> Ints:
        view, add = rounding.ADD[dtype]
        rows = range(self.target.matrix[0])
        left = self.method.left(self.q, self.target, STREAM, rows).astype(np.int64)
        numbers = left @ self.method.right(self.q, self.target, STREAM).astype(np.int64)
        flat = bits.view(view).reshape(-1)
        out, scale = np.empty_like(flat), np.float32(self.scale.unit)
        add(flat, numbers.astype(np.float64).reshape(-1), np.float64(self.scale.c), scale, out)
        return out.view(bits.dtype)


def _cases(method: Method) -> Iterator[_Case]:
    """Yield a tall and a wide target; the sums of one fit 31 bits, those of the other do not."""
    rng = np.random.default_rng(1)
    for shape, bits in zip(SHAPES, (8, max(method.bits)), strict=True):
        target = Target(name="x", dtype="F32", shape=shape, transposed=False, index=7)
        top = largest(bits)
        q = {
            group.name: rng.choice([-top, -5, top - 1, top], group.shape).astype(storage(bits))
            for group in (*method.shared(), *method.groups(target))
        }
        yield _Case(method=method, target=target, q=q)


def _weights(shape: tuple[int, int], dtype: str) -> Ints:
    """Draw raw bits of numbers of every size up to 1, subnormal ones and both zeros among them."""
    rng = np.random.default_rng(2)
    width = np.uint32 if dtype == "F32" else np.uint16
    one = {"F32": 0x3F800000, "F16": 0x3C00, "BF16": 0x3F80}[dtype]
    sizes = rng.integers(0, one, shape).astype(width)
    sizes[:, :4] = (0, 1, 2, one)
    signs = rng.integers(0, 2, shape) << (8 * sizes.itemsize - 1)
    bits: Ints = sizes | signs.astype(width)
    return bits
