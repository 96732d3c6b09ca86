"""Read compressed-tensors: `pack-quantized` integers and `nvfp4-pack-quantized`.

Source: compressed_tensors.compressors (vllm-project/compressed-tensors 0.20).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kilodelta.errors import CheckpointError
from kilodelta.files.tensor import RawTensor
from kilodelta.grid.bits import replace_bits, unpack_bits, unpack_signed
from kilodelta.grid.codes import E2M1, integer_kind
from kilodelta.grid.layouts.base import (
    SCALES,
    Codes,
    Parts,
    RowLayout,
    Stream,
    centred,
    float_values,
    no_codes,
    order_of,
    part,
    sized,
)
from kilodelta.grid.matrix import Matrix


@dataclass(frozen=True, kw_only=True)
class PackQuantized(RowLayout):
    """`weight_packed` I32: a dense bit stream per row, stored code = code + 2^(bits-1)."""

    name: ClassVar[str] = "compressed-tensors pack-quantized"
    codes_in: ClassVar[str] = "weight_packed"

    bits: int
    group: int
    """Columns that share a scale; `in` for one scale per row."""
    symmetric: bool = False
    """Whether the configuration says that there are no zero points."""

    @property
    def nibble_offset(self) -> int | None:
        return 8 if self.bits == 4 and self.shape[1] % 8 == 0 else None  # whole words

    def grid(self, parts: Parts) -> Matrix:
        rows, columns = self.shape
        groups = -(-columns // self.group)
        self.packed(parts)
        scales = part(parts, "weight_scale", self.name, SCALES)
        sized(scales, "weight_scale", self.name, ((rows, groups),))
        order = None
        if "weight_g_idx" in parts:
            g_idx = part(parts, "weight_g_idx", self.name, ("I32",))
            sized(g_idx, "weight_g_idx", self.name, ((columns,),))
            # Older writers leave -1 everywhere where the order is the natural one.
            given = g_idx.values()
            order = None if (given == -1).all() else order_of(given, self.group)
        return Matrix(
            kind=integer_kind(self.bits),
            codes=no_codes(integer_kind(self.bits), self.shape),
            steps=float_values(scales),
            block=(1, self.group),
            zeros=self._zeros(parts, groups),
            order=order,
        )

    def packed(self, parts: Parts) -> RawTensor:
        rows, columns = self.shape
        packed = part(parts, self.codes_in, self.name, ("I32",))
        sized(packed, self.codes_in, self.name, ((rows, -(-columns * self.bits // 32)),))
        return packed

    def _zeros(self, parts: Parts, groups: int) -> np.ndarray | None:
        if "weight_zero_point" not in parts:
            return None
        rows = self.shape[0]
        zeros = part(parts, "weight_zero_point", self.name, ("I32",))
        # Packed along the rows of the weight: word w of a column holds rows 32w/bits and on.
        words = -(-rows * self.bits // 32)
        sized(zeros, "weight_zero_point", self.name, ((words, groups),))
        by_group = np.ascontiguousarray(zeros.values().T).view(np.uint8).reshape(groups, -1)
        stored = unpack_bits(by_group, self.bits)[:, :rows]
        points = np.ascontiguousarray(centred(stored, self.bits).astype(np.int16).T)
        if self.symmetric and points.any():
            raise CheckpointError(
                f"{self.name}: weight_zero_point holds zero points, and the configuration says"
                " symmetric",
                fix="the configuration is of another checkpoint: fetch both again",
            )
        return points

    def decode(self, stream: Stream) -> Codes:
        return unpack_signed(stream, self.bits, self.shape[1])

    def encode(self, stream: Stream, codes: Codes) -> Stream:
        return replace_bits(stream, self.bits, codes, offset=1 << (self.bits - 1))


@dataclass(frozen=True, kw_only=True)
class Nvfp4Packed(RowLayout):
    """`weight_packed` U8: two E2M1 per byte, low first; E4M3 scale per 16, divided by one float32.

    The quotient scale / global is the only division of this room: it is rounded to float32, to
    nearest even, as the library does before it multiplies.
    """

    name: ClassVar[str] = "compressed-tensors nvfp4-pack-quantized"
    codes_in: ClassVar[str] = "weight_packed"
    GROUP: ClassVar[int] = 16

    @property
    def nibble_offset(self) -> int | None:
        return None if self.shape[1] % 2 else 0

    def grid(self, parts: Parts) -> Matrix:
        rows, columns = self.shape
        self.packed(parts)
        scales = part(parts, "weight_scale", self.name, ("F8_E4M3",))
        sized(scales, "weight_scale", self.name, ((rows, -(-columns // self.GROUP)),))
        whole = part(parts, "weight_global_scale", self.name, ("F32",))
        sized(whole, "weight_global_scale", self.name, ((1,), ()))
        if not np.isfinite(whole.values()).all():  # a division by infinity would hide it
            raise CheckpointError(
                f"{self.name}: weight_global_scale is {whole.values().reshape(())}, so the weights"
                " have no value",
                fix="the file is damaged, or written by a tool that failed: fetch it again",
            )
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            # float32 / float32 in numpy is one IEEE division
            steps = float_values(scales).astype(np.float32) / whole.values().reshape(())
        return Matrix(
            kind=E2M1,
            codes=no_codes(E2M1, self.shape),
            steps=steps.astype(np.float64),
            block=(1, self.GROUP),
        )

    def packed(self, parts: Parts) -> RawTensor:
        rows, columns = self.shape
        packed = part(parts, self.codes_in, self.name, ("U8",))
        sized(packed, self.codes_in, self.name, ((rows, -(-columns // 2)),))
        return packed

    def decode(self, stream: Stream) -> Codes:
        return unpack_bits(stream, 4)[:, : self.shape[1]]

    def encode(self, stream: Stream, codes: Codes) -> Stream:
        return replace_bits(stream, 4, codes)
