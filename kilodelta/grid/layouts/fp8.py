"""Read weights of E4M3 bytes with float scales: ModelOpt's FP8, and fine-grained FP8.

One scale may serve the whole tensor (ModelOpt, `weight_scale`), a row, or a block of 128 x 128
(DeepSeek's and transformers' `weight_scale_inv`, a factor in spite of its name); last blocks may be
partial.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kilodelta.files.tensor import RawTensor
from kilodelta.grid.codes import E4M3
from kilodelta.grid.layouts.base import (
    SCALES,
    Codes,
    Parts,
    RowLayout,
    Stream,
    float_values,
    no_codes,
    part,
    sized,
)
from kilodelta.grid.matrix import Matrix, Shape


@dataclass(frozen=True, kw_only=True)
class Fp8(RowLayout):
    """`weight` F8_E4M3 (out, in) and one float scale per block."""

    name: ClassVar[str] = "FP8 (E4M3)"
    codes_in: ClassVar[str] = "weight"

    scale: str
    """The role of the scale: `weight_scale` or `weight_scale_inv`."""
    block: Shape

    def grid(self, parts: Parts) -> Matrix:
        rows, columns = self.shape
        self.packed(parts)
        scales = part(parts, self.scale, self.name, SCALES)
        grid = (-(-rows // self.block[0]), -(-columns // self.block[1]))
        flat: tuple[tuple[int, ...], ...] = ((), (1,)) if grid == (1, 1) else ()
        by_row: tuple[tuple[int, ...], ...] = ((rows,),) if grid == (rows, 1) else ()
        sized(scales, self.scale, self.name, (grid, *flat, *by_row))
        return Matrix(
            kind=E4M3,
            codes=no_codes(E4M3, self.shape),
            steps=float_values(scales).reshape(grid),
            block=self.block,
        )

    def packed(self, parts: Parts) -> RawTensor:
        weight = part(parts, self.codes_in, self.name, ("F8_E4M3",))
        sized(weight, self.codes_in, self.name, (self.shape,))
        return weight

    def decode(self, stream: Stream) -> Codes:
        return stream

    def encode(self, stream: Stream, codes: Codes) -> Stream:
        return codes
