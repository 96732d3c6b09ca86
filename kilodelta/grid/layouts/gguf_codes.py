"""Read and write the codes of each of GGUF's types of blocks, steps and minima between them.

Source: ggml's `ggml-quants.c` and `ggml-common.h`, and the `gguf` package's `quants.py`. Every
`read` takes blocks, uint8 (n, bytes), and returns stored codes (n, weights), steps and minima
(n, weights / group); every `write` puts stored codes into blocks in place.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kilodelta.grid.layouts.base import Codes, centred, uncentred
from kilodelta.grid.matrix import Floats

Blocks = npt.NDArray[np.uint8]
"""uint8 (blocks, bytes of a block)."""
_TWOS = np.array([0, 2, 4, 6], np.uint8).reshape(4, 1)
"""Where four codes of two bits lie in a byte."""


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


def read_q4_0(blocks: Blocks) -> tuple[Codes, Floats, None]:
    return _split(blocks[:, 2:]), _half(blocks, 0), None


def write_q4_0(blocks: Blocks, codes: Codes) -> None:
    blocks[:, 2:] = _joined(codes)


def read_q4_1(blocks: Blocks) -> tuple[Codes, Floats, Floats]:
    return _split(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2)


def write_q4_1(blocks: Blocks, codes: Codes) -> None:
    blocks[:, 4:] = _joined(codes)


def _read_fives(blocks: Blocks, begin: int) -> Codes:
    """Read codes of five bits: four bytes of fifth bits, one per weight, then nibbles."""
    fifth = np.unpackbits(blocks[:, begin : begin + 4], axis=1, bitorder="little")
    codes: Codes = _split(blocks[:, begin + 4 :]) | (fifth << np.uint8(4))
    return codes


def _write_fives(blocks: Blocks, codes: Codes, begin: int) -> None:
    blocks[:, begin : begin + 4] = np.packbits(codes >> np.uint8(4), axis=1, bitorder="little")
    blocks[:, begin + 4 :] = _joined(codes & np.uint8(15))


def read_q5_0(blocks: Blocks) -> tuple[Codes, Floats, None]:
    return _read_fives(blocks, 2), _half(blocks, 0), None


def write_q5_0(blocks: Blocks, codes: Codes) -> None:
    _write_fives(blocks, codes, 2)


def read_q5_1(blocks: Blocks) -> tuple[Codes, Floats, Floats]:
    return _read_fives(blocks, 4), _half(blocks, 0), _half(blocks, 2)


def write_q5_1(blocks: Blocks, codes: Codes) -> None:
    _write_fives(blocks, codes, 4)


def read_q8_0(blocks: Blocks) -> tuple[Codes, Floats, None]:
    return blocks[:, 2:].view(np.int8), _half(blocks, 0), None


def write_q8_0(blocks: Blocks, codes: Codes) -> None:
    blocks[:, 2:] = codes.view(np.uint8)


def _eights(blocks: Blocks) -> tuple[Floats, Floats]:
    """Read steps and minima of Q4_K and Q5_K: eight pairs of six bits each, times d and dmin."""
    packed = blocks[:, 4:16].astype(np.int64)
    low, high, rest = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 63, (rest & 15) | (low >> 6 << 4)], axis=1)
    minima = np.concatenate([high & 63, (rest >> 4) | (high >> 6 << 4)], axis=1)
    return _half(blocks, 0) * scales, -_half(blocks, 2) * minima


def read_q4_k(blocks: Blocks) -> tuple[Codes, Floats, Floats]:
    return _split(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 256), *_eights(blocks)


def write_q4_k(blocks: Blocks, codes: Codes) -> None:
    blocks[:, 16:] = _joined(codes.reshape(-1, 4, 64)).reshape(-1, 128)


def read_q5_k(blocks: Blocks) -> tuple[Codes, Floats, Floats]:
    """Bit j of byte i of the fifth bits is of weight 32 j + i."""
    fifth = np.unpackbits(blocks[:, 16:48, None], axis=2, bitorder="little").swapaxes(1, 2)
    fours = _split(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return (fours | (fifth << np.uint8(4))).reshape(-1, 256), *_eights(blocks)


def write_q5_k(blocks: Blocks, codes: Codes) -> None:
    eights = codes.reshape(-1, 8, 32)
    fifth = np.packbits(eights >> np.uint8(4), axis=1, bitorder="little")
    blocks[:, 16:48] = fifth.reshape(-1, 32)
    blocks[:, 48:] = _joined((eights & np.uint8(15)).reshape(-1, 4, 64)).reshape(-1, 128)


def _read_pairs(packed: Blocks) -> Codes:
    """Read codes of two bits, (n, 64) to (n, 2, 4, 32): byte l of a half holds l, l + 32, ..."""
    return (packed.reshape(-1, 2, 1, 32) >> _TWOS) & np.uint8(3)


def _written_pairs(codes: Codes) -> Blocks:
    """Undo `_read_pairs`."""
    pairs: Blocks = np.bitwise_or.reduce(codes.reshape(-1, 2, 4, 32) << _TWOS, axis=2)
    return pairs.reshape(-1, 64)


def read_q2_k(blocks: Blocks) -> tuple[Codes, Floats, Floats]:
    """16 bytes of a scale (low) and a minimum (high), 64 bytes of codes, d and dmin."""
    steps, minima = blocks[:, :16] & 15, blocks[:, :16] >> 4
    codes = _read_pairs(blocks[:, 16:80]).reshape(-1, 256)
    return codes, _half(blocks, 80) * steps, -_half(blocks, 82) * minima


def write_q2_k(blocks: Blocks, codes: Codes) -> None:
    blocks[:, 16:80] = _written_pairs(codes)


def read_q3_k(blocks: Blocks) -> tuple[Codes, Floats, None]:
    """32 bytes of third bits (bit j of byte i is of weight 32 j + i), 64 bytes of codes, scales.

    A scale has six bits: four of them in a nibble of the first eight bytes, two in the last four.
    """
    third = np.unpackbits(blocks[:, :32, None], axis=2, bitorder="little").swapaxes(1, 2)
    codes = _read_pairs(blocks[:, 32:96]).reshape(-1, 8, 32) | (third << np.uint8(2))
    fours = _split(blocks[:, 96:104])
    twos = ((blocks[:, None, 104:108] >> _TWOS) & np.uint8(3)).reshape(-1, 16)
    scales = (fours | (twos << np.uint8(4))).astype(np.int64) - 32
    return codes.reshape(-1, 256), _half(blocks, 108) * scales, None


def write_q3_k(blocks: Blocks, codes: Codes) -> None:
    eights = codes.reshape(-1, 8, 32)
    third = np.packbits(eights >> np.uint8(2), axis=1, bitorder="little")
    blocks[:, :32] = third.reshape(-1, 32)
    blocks[:, 32:96] = _written_pairs(eights & np.uint8(3))


def read_q6_k(blocks: Blocks) -> tuple[Codes, Floats, None]:
    low = blocks[:, :128].reshape(-1, 2, 2, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    fours = np.concatenate([low & 15, low >> 4], axis=2)
    twos = (high >> _TWOS) & 3
    codes = centred((fours | (twos << np.uint8(4))).reshape(-1, 256), 6)
    steps = blocks[:, 192:208].view(np.int8).astype(np.float64)
    return codes, _half(blocks, 208) * steps, None


def write_q6_k(blocks: Blocks, codes: Codes) -> None:
    stored = uncentred(codes, 6).reshape(-1, 2, 4, 32)
    fours, twos = stored & 15, stored >> 4
    blocks[:, :128] = (fours[:, :, :2] | (fours[:, :, 2:] << np.uint8(4))).reshape(-1, 128)
    shifted = twos << _TWOS
    blocks[:, 128:192] = np.bitwise_or.reduce(shifted, axis=2).reshape(-1, 64)
