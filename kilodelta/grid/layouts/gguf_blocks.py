"""Read GGUF's blocks: Q4_0 to Q8_0, and the K-quants.

Source: ggml's `ggml-quants.c` and the `gguf` package. A row is a sequence of blocks, each with its
steps inside; so a merge rewrites the codes between them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from kilodelta.files.tensor import RawTensor
from kilodelta.grid.codes import integer_kind
from kilodelta.grid.layouts.base import Codes, Layout, Parts, centred, part, sized, uncentred
from kilodelta.grid.layouts.gguf_codes import (
    Blocks,
    read_q2_k,
    read_q3_k,
    read_q4_0,
    read_q4_1,
    read_q4_k,
    read_q5_0,
    read_q5_1,
    read_q5_k,
    read_q6_k,
    read_q8_0,
    write_q2_k,
    write_q3_k,
    write_q4_0,
    write_q4_1,
    write_q4_k,
    write_q5_0,
    write_q5_1,
    write_q5_k,
    write_q6_k,
    write_q8_0,
)
from kilodelta.grid.matrix import Floats, Matrix

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class BlockType:
    """One of GGUF's types.

    Attributes:
        number: in the file (`GGMLQuantizationType`).
        bits: of a code, as an integer kind.
        weights, nbytes: of a block.
        group: weights that share a step.
        read: from blocks to stored codes (n, weights), steps and minima (n, weights / group);
            stored codes are unsigned, but for Q8_0's and Q6_K's, which are centred already.
        write: puts stored codes, as `read` gives them, into a copy of the blocks.
        has_minimum: whether the value is step * stored + minimum.
    """

    number: int
    bits: int
    weights: int
    nbytes: int
    group: int
    read: Callable[[Blocks], tuple[Codes, Floats, Floats | None]]
    write: Callable[[Blocks, Codes], None]
    has_minimum: bool = False


TYPES: Mapping[str, BlockType] = MappingProxyType(
    {
        "Q4_0": BlockType(
            number=2, bits=4, weights=32, nbytes=18, group=32,
            read=read_q4_0, write=write_q4_0,
        ),
        "Q4_1": BlockType(
            number=3, bits=4, weights=32, nbytes=20, group=32,
            read=read_q4_1, write=write_q4_1, has_minimum=True,
        ),
        "Q5_0": BlockType(
            number=6, bits=5, weights=32, nbytes=22, group=32,
            read=read_q5_0, write=write_q5_0,
        ),
        "Q5_1": BlockType(
            number=7, bits=5, weights=32, nbytes=24, group=32,
            read=read_q5_1, write=write_q5_1, has_minimum=True,
        ),
        "Q8_0": BlockType(
            number=8, bits=8, weights=32, nbytes=34, group=32,
            read=read_q8_0, write=write_q8_0,
        ),
        "Q2_K": BlockType(
            number=10, bits=2, weights=256, nbytes=84, group=16,
            read=read_q2_k, write=write_q2_k, has_minimum=True,
        ),
        "Q3_K": BlockType(
            number=11, bits=3, weights=256, nbytes=110, group=16,
            read=read_q3_k, write=write_q3_k,
        ),
        "Q4_K": BlockType(
            number=12, bits=4, weights=256, nbytes=144, group=32,
            read=read_q4_k, write=write_q4_k, has_minimum=True,
        ),
        "Q5_K": BlockType(
            number=13, bits=5, weights=256, nbytes=176, group=32,
            read=read_q5_k, write=write_q5_k, has_minimum=True,
        ),
        "Q6_K": BlockType(
            number=14, bits=6, weights=256, nbytes=210, group=16,
            read=read_q6_k, write=write_q6_k,
        ),
    }
)  # fmt: skip
"""The types that are read, by GGUF's name."""


def interleaved(rows: int, heads: int) -> Rows:
    """Return which row of a matrix, as Hugging Face has it, is each row of llama.cpp's.

    The llama architecture interleaves the two halves of each head's rotary dimensions, so the rows
    of queries and keys stand in another order there (`permute` of `convert_hf_to_gguf.py`).

    Args:
        rows: a multiple of twice `heads`.
        heads: of the queries, or of the keys.

    Returns:
        int64 (rows,).

    Example:
        >>> interleaved(8, heads=2).tolist()
        [0, 2, 1, 3, 4, 6, 5, 7]
    """
    order: Rows = np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)
    return order


@dataclass(frozen=True, kw_only=True)
class GgufBlocks(Layout):
    """Rows of blocks, U8 (out, bytes of a row).

    Attributes:
        type: of the blocks.
        heads: where rows are read in Hugging Face's order and stored `interleaved`, of how many
            heads they are; 0 where they are read as they are stored.
    """

    name: ClassVar[str] = "GGUF"
    codes_in: ClassVar[str] = "blocks"

    type: str
    heads: int = 0

    def unpack(self, parts: Parts) -> Matrix:
        kind = TYPES[self.type]
        rows, columns = self.shape
        stored, steps, minima = kind.read(self._blocks(parts))
        signed = stored.dtype == np.int8
        centre: Any = stored if signed else centred(stored, kind.bits)
        grid = (rows, columns // kind.group)
        # A block with a minimum counts from the least code, which is stored as 0.
        zeros = np.full(grid, -(1 << (kind.bits - 1)), np.int16) if kind.has_minimum else None
        return Matrix(
            kind=integer_kind(kind.bits),
            codes=self._read(centre.reshape(rows, columns)),
            steps=self._read(steps.reshape(grid)),
            block=(1, kind.group),
            zeros=zeros,
            minima=None if minima is None else self._read(minima.reshape(grid)),
        )

    def _read(self, stored: Any) -> Any:
        """Bring rows from the order of the file into that of the weight."""
        if not self.heads:
            return stored
        rows = np.empty_like(stored)
        rows[interleaved(len(stored), self.heads)] = stored
        return rows

    def _blocks(self, parts: Parts) -> Blocks:
        kind = TYPES[self.type]
        rows, columns = self.shape
        blocks = part(parts, self.codes_in, self.name, ("U8",))
        sized(blocks, self.codes_in, self.name, ((rows, columns // kind.weights * kind.nbytes),))
        return blocks.data.reshape(-1, kind.nbytes)

    def recode(self, parts: Parts, codes: Codes) -> RawTensor:
        kind = TYPES[self.type]
        blocks = self._blocks(parts).copy()
        if self.heads:
            codes = codes[interleaved(len(codes), self.heads)]
        stored = codes if self.type in ("Q8_0", "Q6_K") else uncentred(codes, kind.bits)
        kind.write(blocks, stored.reshape(-1, kind.weights))
        return RawTensor(dtype="U8", shape=parts[self.codes_in].shape, data=blocks.reshape(-1))
