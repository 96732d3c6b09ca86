"""Read GGUF's blocks: Q4_0, Q4_1, Q8_0, Q4_K and Q6_K.

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
from kilodelta.grid.matrix import Floats, Matrix

Blocks = npt.NDArray[np.uint8]
"""uint8 (blocks, bytes of a block)."""
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


def _half(blocks: Blocks, begin: int) -> Floats:
    """Read one float16 of each block, float64 (n, 1)."""
    words = np.ascontiguousarray(blocks[:, begin : begin + 2]).view("<f2")
    return words.astype(np.float64)


def _split(nibbles: Blocks) -> Codes:
    """Low nibbles, then high ones, of runs: (..., m) to (..., 2m)."""
    return np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)


def _joined(codes: Codes) -> Blocks:
    """Undo `_split`."""
    half = codes.shape[-1] // 2
    joined: Blocks = codes[..., :half] | (codes[..., half:] << np.uint8(4))
    return joined


def _read_q4_0(blocks: Blocks) -> tuple[Codes, Floats, None]:
    return _split(blocks[:, 2:]), _half(blocks, 0), None


def _write_q4_0(blocks: Blocks, codes: Codes) -> None:
    blocks[:, 2:] = _joined(codes)


def _read_q4_1(blocks: Blocks) -> tuple[Codes, Floats, Floats]:
    return _split(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2)


def _write_q4_1(blocks: Blocks, codes: Codes) -> None:
    blocks[:, 4:] = _joined(codes)


def _read_q8_0(blocks: Blocks) -> tuple[Codes, Floats, None]:
    return blocks[:, 2:].view(np.int8), _half(blocks, 0), None


def _write_q8_0(blocks: Blocks, codes: Codes) -> None:
    blocks[:, 2:] = codes.view(np.uint8)


def _read_q4_k(blocks: Blocks) -> tuple[Codes, Floats, Floats]:
    packed = blocks[:, 4:16].astype(np.int64)
    low, high, rest = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 63, (rest & 15) | (low >> 6 << 4)], axis=1)
    minima = np.concatenate([high & 63, (rest >> 4) | (high >> 6 << 4)], axis=1)
    codes = _split(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 256)
    return codes, _half(blocks, 0) * scales, -_half(blocks, 2) * minima


def _write_q4_k(blocks: Blocks, codes: Codes) -> None:
    blocks[:, 16:] = _joined(codes.reshape(-1, 4, 64)).reshape(-1, 128)


def _read_q6_k(blocks: Blocks) -> tuple[Codes, Floats, None]:
    low = blocks[:, :128].reshape(-1, 2, 2, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    fours = np.concatenate([low & 15, low >> 4], axis=2)
    twos = (high >> np.array([0, 2, 4, 6], np.uint8).reshape(4, 1)) & 3
    codes = centred((fours | (twos << np.uint8(4))).reshape(-1, 256), 6)
    steps = blocks[:, 192:208].view(np.int8).astype(np.float64)
    return codes, _half(blocks, 208) * steps, None


def _write_q6_k(blocks: Blocks, codes: Codes) -> None:
    stored = uncentred(codes, 6).reshape(-1, 2, 4, 32)
    fours, twos = stored & 15, stored >> 4
    blocks[:, :128] = (fours[:, :, :2] | (fours[:, :, 2:] << np.uint8(4))).reshape(-1, 128)
    shifted = twos << np.array([0, 2, 4, 6], np.uint8).reshape(4, 1)
    blocks[:, 128:192] = np.bitwise_or.reduce(shifted, axis=2).reshape(-1, 64)


TYPES: Mapping[str, BlockType] = MappingProxyType(
    {
        "Q4_0": BlockType(
            number=2, bits=4, weights=32, nbytes=18, group=32, read=_read_q4_0, write=_write_q4_0
        ),
        "Q4_1": BlockType(
            number=3, bits=4, weights=32, nbytes=20, group=32, read=_read_q4_1, write=_write_q4_1,
            has_minimum=True,
        ),
        "Q8_0": BlockType(
            number=8, bits=8, weights=32, nbytes=34, group=32, read=_read_q8_0, write=_write_q8_0
        ),
        "Q4_K": BlockType(
            number=12, bits=4, weights=256, nbytes=144, group=32, read=_read_q4_k,
            write=_write_q4_k, has_minimum=True,
        ),
        "Q6_K": BlockType(
            number=14, bits=6, weights=256, nbytes=210, group=16, read=_read_q6_k,
            write=_write_q6_k,
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
        codes: Any = stored if signed else centred(stored, kind.bits)
        grid = (rows, columns // kind.group)
        # A block with a minimum counts from the least code, which is stored as 0.
        zeros = np.full(grid, -(1 << (kind.bits - 1)), np.int16) if kind.has_minimum else None
        return Matrix(
            kind=integer_kind(kind.bits),
            codes=self._read(codes.reshape(rows, columns)),
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
