"""Read GPTQ's checkpoints, of AutoGPTQ and GPTQModel, and those of AutoAWQ (GEMM).

Both store the transposed weight in I32 words of unsigned codes. Sources: Frantar et al., arXiv
2210.17323, and GPTQModel 7.7; Lin et al., arXiv 2306.00978, and AutoAWQ's `WQLinear_GEMM`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from kilodelta.files.tensor import RawTensor
from kilodelta.grid.bits import pack_bits, unpack_bits
from kilodelta.grid.codes import integer_kind
from kilodelta.grid.layouts.base import (
    SCALES,
    Codes,
    Layout,
    Parts,
    centred,
    columns_as_rows,
    float_values,
    from_columns,
    order_of,
    part,
    rows_of,
    sized,
    uncentred,
)
from kilodelta.grid.matrix import Matrix

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column, of eight, that each nibble of an AWQ word holds, low nibble first."""

V1 = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""What GPTQ's first format subtracts from each word of zero points: one per code. Codes of zero
borrow from the next one, so it is added back to the whole word."""


@dataclass(frozen=True, kw_only=True)
class Gptq(Layout):
    """`qweight` I32 (in * bits / 32, out), low bits first along `in`."""

    name: ClassVar[str] = "GPTQ"
    codes_in: ClassVar[str] = "qweight"

    bits: int
    group: int
    v1: bool
    """Whether zero points are stored less one (`checkpoint_format` gptq, not gptq_v2)."""

    def unpack(self, parts: Parts) -> Matrix:
        rows, columns = self.shape
        groups = -(-columns // self.group)
        scales = part(parts, "scales", self.name, SCALES)
        sized(scales, "scales", self.name, ((groups, rows),))
        stored = unpack_bits(columns_as_rows(self._codes(parts)), self.bits)
        order = None
        if "g_idx" in parts:
            g_idx = part(parts, "g_idx", self.name, ("I32",))
            sized(g_idx, "g_idx", self.name, ((columns,),))
            order = order_of(g_idx.values(), self.group)
        return Matrix(
            kind=integer_kind(self.bits),
            codes=centred(stored, self.bits),
            steps=np.ascontiguousarray(float_values(scales).T),
            block=(1, self.group),
            zeros=self._zeros(parts, groups),
            order=order,
        )

    def _codes(self, parts: Parts) -> RawTensor:
        rows, columns = self.shape
        qweight = part(parts, self.codes_in, self.name, ("I32",))
        sized(qweight, self.codes_in, self.name, ((columns * self.bits // 32, rows),))
        return qweight

    def _zeros(self, parts: Parts, groups: int) -> npt.NDArray[np.int16]:
        rows = self.shape[0]
        qzeros = part(parts, "qzeros", self.name, ("I32",))
        sized(qzeros, "qzeros", self.name, ((groups, rows * self.bits // 32),))
        words = qzeros.data.view("<u4").reshape(groups, -1)
        if self.v1:
            words = words + np.uint32(V1[self.bits])  # modulo 2^32, as it was subtracted
        stored = unpack_bits(np.ascontiguousarray(words).view(np.uint8), self.bits)
        return np.ascontiguousarray(centred(stored, self.bits).astype(np.int16).T)

    def recode(self, parts: Parts, codes: Codes) -> RawTensor:
        qweight = self._codes(parts)
        stream = pack_bits(uncentred(codes, self.bits), self.bits, qweight.shape[0] * 4)
        return from_columns(stream, qweight)


@dataclass(frozen=True, kw_only=True)
class Awq(Layout):
    """`qweight` I32 (in, out / 8): the nibbles of a word hold columns 0 2 4 6 1 3 5 7 of eight."""

    name: ClassVar[str] = "AWQ"
    codes_in: ClassVar[str] = "qweight"

    group: int

    def unpack(self, parts: Parts) -> Matrix:
        rows, columns = self.shape
        groups = -(-columns // self.group)
        scales = part(parts, "scales", self.name, SCALES)
        sized(scales, "scales", self.name, ((groups, rows),))
        qzeros = part(parts, "qzeros", self.name, ("I32",))
        sized(qzeros, "qzeros", self.name, ((groups, rows // 8),))
        return Matrix(
            kind=integer_kind(4),
            codes=np.ascontiguousarray(_in_order(self._codes(parts)).T),
            steps=np.ascontiguousarray(float_values(scales).T),
            block=(1, self.group),
            zeros=np.ascontiguousarray(_in_order(qzeros).T).astype(np.int16),
        )

    def _codes(self, parts: Parts) -> RawTensor:
        rows, columns = self.shape
        qweight = part(parts, self.codes_in, self.name, ("I32",))
        sized(qweight, self.codes_in, self.name, ((columns, rows // 8),))
        return qweight

    def recode(self, parts: Parts, codes: Codes) -> RawTensor:
        rows, columns = self.shape
        eights = uncentred(codes, 4).T.reshape(columns, rows // 8, 8)[:, :, AWQ_ORDER]
        stream = pack_bits(eights.reshape(columns, rows), 4, rows // 2)
        return RawTensor(dtype="I32", shape=(columns, rows // 8), data=stream.reshape(-1))


def _in_order(words: RawTensor) -> npt.NDArray[Any]:
    """Unpack AWQ's words, int8 (words' rows, 8 * words' columns)."""
    stored = unpack_bits(rows_of(words), 4).reshape(*words.shape, 8)
    found = np.empty_like(stored)
    found[:, :, AWQ_ORDER] = stored
    return centred(found.reshape(words.shape[0], -1), 4)
