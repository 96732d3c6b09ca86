"""Read NVIDIA ModelOpt's checkpoints: NVFP4 and INT4 (its FP8 is in `fp8`).

Source: ModelOpt 0.47's exporter. Its scales multiply; none of them divides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kilodelta.files.tensor import RawTensor
from kilodelta.grid.bits import replace_bits, unpack_bits
from kilodelta.grid.codes import E2M1, integer_kind
from kilodelta.grid.layouts.base import (
    Codes,
    Layout,
    Parts,
    RowLayout,
    Stream,
    float_values,
    nibbles,
    no_codes,
    part,
    rows_of,
    signed_nibbles,
    sized,
)
from kilodelta.grid.matrix import Matrix


@dataclass(frozen=True, kw_only=True)
class ModelOptNvfp4(RowLayout):
    """`weight` U8: two E2M1 per byte, low first; E4M3 scale per 16 times one float32."""

    name: ClassVar[str] = "ModelOpt NVFP4"
    codes_in: ClassVar[str] = "weight"
    GROUP: ClassVar[int] = 16

    @property
    def nibble_offset(self) -> int | None:
        return None if self.shape[1] % 2 else 0

    def grid(self, parts: Parts) -> Matrix:
        rows, columns = self.shape
        self.packed(parts)
        scales = part(parts, "weight_scale", self.name, ("F8_E4M3",))
        sized(scales, "weight_scale", self.name, ((rows, -(-columns // self.GROUP)),))
        whole = part(parts, "weight_scale_2", self.name, ("F32",))
        sized(whole, "weight_scale_2", self.name, ((), (1,)))
        return Matrix(
            kind=E2M1,
            codes=no_codes(E2M1, self.shape),
            steps=float_values(scales) * float_values(whole).reshape(()),  # 28 bits: exact
            block=(1, self.GROUP),
        )

    def packed(self, parts: Parts) -> RawTensor:
        rows, columns = self.shape
        weight = part(parts, self.codes_in, self.name, ("U8",))
        sized(weight, self.codes_in, self.name, ((rows, -(-columns // 2)),))
        return weight

    def decode(self, stream: Stream) -> Codes:
        return unpack_bits(stream, 4)[:, : self.shape[1]]

    def encode(self, stream: Stream, codes: Codes) -> Stream:
        return replace_bits(stream, 4, codes)


@dataclass(frozen=True, kw_only=True)
class ModelOptInt4(Layout):
    """`weight` U8 (out/2, in), two's complement: row 2i in the low nibbles, 2i+1 in the high."""

    name: ClassVar[str] = "ModelOpt INT4"
    codes_in: ClassVar[str] = "weight"

    group: int

    def unpack(self, parts: Parts) -> Matrix:
        rows, columns = self.shape
        weight = self._codes(parts)
        scales = part(parts, "weight_scale", self.name, ("F32", "F16", "BF16"))
        sized(scales, "weight_scale", self.name, ((rows, -(-columns // self.group)),))
        stored = np.empty((rows, columns), np.uint8)
        stored[::2], stored[1::2] = rows_of(weight) & 15, rows_of(weight) >> 4
        return Matrix(
            kind=integer_kind(4),
            codes=signed_nibbles(stored),
            steps=float_values(scales),
            block=(1, self.group),
        )

    def _codes(self, parts: Parts) -> RawTensor:
        rows, columns = self.shape
        weight = part(parts, self.codes_in, self.name, ("U8",))
        sized(weight, self.codes_in, self.name, ((rows // 2, columns),))
        return weight

    def recode(self, parts: Parts, codes: Codes) -> RawTensor:
        stored = nibbles(codes, integer_kind(4))
        packed = stored[::2] | (stored[1::2] << np.uint8(4))
        weight = self._codes(parts)
        return RawTensor(dtype="U8", shape=weight.shape, data=packed.reshape(-1))
