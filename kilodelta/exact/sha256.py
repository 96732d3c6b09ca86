"""Compute the SHA-256 of two streams at a time, by a processor's own instructions for it.

FIPS 180-4. The SHA extensions of x86-64 compute two rounds in one instruction, of which the next
one needs the result: a single stream waits for half of its time. Two independent streams, whose
instructions take turns, fill that half. hashlib has one stream at a time; so where the processor
has the instructions, and a self-test agrees with hashlib, `new` gives a hash of this module, which
`update_both` can take in pairs. Everywhere else it gives hashlib's.
"""

from __future__ import annotations

import hashlib
import struct
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kilodelta.exact.compiled import kernel
from kilodelta.files.identity import Hash

BLOCK = 64
"""Bytes of a block."""
STATE = 32
"""Bytes of a state."""
START = (
    0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19,
)  # fmt: skip
"""The first state, a to h: FIPS 180-4, section 5.3.3."""
ROUNDS = (
    0x428A2F98, 0x71374491, 0xB5C0FBCF, 0xE9B5DBA5, 0x3956C25B, 0x59F111F1, 0x923F82A4, 0xAB1C5ED5,
    0xD807AA98, 0x12835B01, 0x243185BE, 0x550C7DC3, 0x72BE5D74, 0x80DEB1FE, 0x9BDC06A7, 0xC19BF174,
    0xE49B69C1, 0xEFBE4786, 0x0FC19DC6, 0x240CA1CC, 0x2DE92C6F, 0x4A7484AA, 0x5CB0A9DC, 0x76F988DA,
    0x983E5152, 0xA831C66D, 0xB00327C8, 0xBF597FC7, 0xC6E00BF3, 0xD5A79147, 0x06CA6351, 0x14292967,
    0x27B70A85, 0x2E1B2138, 0x4D2C6DFC, 0x53380D13, 0x650A7354, 0x766A0ABB, 0x81C2C92E, 0x92722C85,
    0xA2BFE8A1, 0xA81A664B, 0xC24B8B70, 0xC76C51A3, 0xD192E819, 0xD6990624, 0xF40E3585, 0x106AA070,
    0x19A4C116, 0x1E376C08, 0x2748774C, 0x34B0BCB5, 0x391C0CB3, 0x4ED8AA4A, 0x5B9CCA4F, 0x682E6FF3,
    0x748F82EE, 0x78A5636F, 0x84C87814, 0x8CC70208, 0x90BEFFFA, 0xA4506CEB, 0xBEF9A3F7, 0xC67178F2,
)  # fmt: skip
"""The constant of each round, section 4.2.2."""
_PLACES = [5, 4, 1, 0, 7, 6, 3, 2]
"""Which of a to h each word of a state is: the instructions take f e b a and h g d c."""

_WORDS = ir.VectorType(ir.IntType(32), 4)
_Pair = tuple[Any, Any]


def new(data: bytes = b"") -> Hash:
    """Start a SHA-256: one that `update_both` is fast with where this processor has one.

    Example:
        >>> new(b"abc").hexdigest()[:16]
        'ba7816bf8f01cfea'
    """
    return Sha256(data) if has_pairs() else hashlib.sha256(data)


def update_both(first: Hash, data: Any, second: Hash, other: Any) -> None:
    """Update two hashes, which are not the same one, each with its own bytes.

    Args:
        first, second: of `new`.
        data, other: any contiguous buffers, best of the same size.
    """
    if not (isinstance(first, Sha256) and isinstance(second, Sha256)):
        first.update(data)
        second.update(other)
        return
    ours, theirs = np.frombuffer(data, np.uint8), np.frombuffer(other, np.uint8)
    _two(*first._take(ours), *second._take(theirs))


@lru_cache(maxsize=1)
def has_pairs() -> bool:
    """Return whether this processor has the instructions, and they pass a self-test."""
    try:
        return _has_instructions() and _is_right()
    except Exception:  # numba cannot compile here, in any of many ways: hashlib can do all of it
        return False


def _has_instructions() -> bool:
    """Ask numba, not the processor, as it may have been told to compile for another one."""
    from numba.core.registry import cpu_target

    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    return triple.startswith("x86_64") and {"+sha", "+sse4.1"} <= set(features.split(","))


def _is_right() -> bool:
    """Hash two streams in parts of many lengths, as hashlib does."""
    data = bytes((i * i + (i >> 3)) & 255 for i in range(1500))
    ours, theirs = (Sha256(), Sha256()), (hashlib.sha256(), hashlib.sha256())
    for size in (0, 1, 55, 56, 63, 64, 65, 127, 128, 500, 1000):
        parts = data[size:], data[: size + 3]
        update_both(ours[0], parts[0], ours[1], parts[1])
        for state, part in zip(theirs, parts, strict=True):
            state.update(part)
        if [a.hexdigest() for a in ours] != [b.hexdigest() for b in theirs]:
            return False
    return True


class Sha256:
    """A SHA-256 by the processor's instructions; use `new`, which asks whether it has them."""

    def __init__(self, data: bytes = b"") -> None:
        self._state = np.zeros(STATE + BLOCK, np.uint8)
        self._words = self._state[:STATE].view(np.uint32)
        self._words[:] = np.array(START, np.uint32)[_PLACES]
        self._place, self._count = _place(self._state), 0
        self.update(data)

    def update(self, data: Any) -> None:
        """Take any contiguous buffer, which follows what was taken so far."""
        _one(*self._take(np.frombuffer(data, np.uint8)))

    def hexdigest(self) -> str:
        """Return the digest of what was taken so far; more may follow."""
        rest = self._count % BLOCK
        zeros, length = bytes(-(rest + 9) % BLOCK), struct.pack(">Q", 8 * self._count)
        last = Sha256()
        last._state[:], last._count = self._state, self._count
        last.update(b"\x80" + zeros + length)
        words = np.empty(8, ">u4")
        words[_PLACES] = last._words
        return words.tobytes().hex()

    def _take(self, data: npt.NDArray[np.uint8]) -> tuple[int, int, int, int]:
        """Count data in; return the arguments of `_begin`."""
        rest = self._count % BLOCK
        self._count += data.size
        return self._place, rest, _place(data), data.size


def _place(array: npt.NDArray[Any]) -> int:
    """Return the address of an array's first element."""
    address: int = array.__array_interface__["data"][0]
    return address


def _call(builder: Any, name: str, *arguments: Any) -> Any:
    """Call one of LLVM's functions, of four words each, that are single instructions."""
    signature = ir.FunctionType(_WORDS, [_WORDS] * len(arguments))
    function = cgutils.get_or_insert_function(builder.module, signature, name)
    return builder.call(function, arguments)


def _pick(builder: Any, low: Any, high: Any, places: list[int]) -> Any:
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(places)), places)
    return builder.shuffle_vector(low, high, mask)


def _load_message(builder: Any, block: Any) -> list[Any]:
    """Load a block's sixteen words, which are big-endian, in four vectors."""
    count = ir.IntType(64)
    places = [builder.gep(block, [ir.Constant(count, i)]) for i in range(4)]
    return [_call(builder, "llvm.bswap.v4i32", builder.load(place, align=1)) for place in places]


def _four_rounds(builder: Any, state: _Pair, message: list[Any], number: int) -> _Pair:
    """Build four rounds of a stream, and its message of four rounds that come sixteen later."""
    keys = ir.Constant(_WORDS, list(ROUNDS[4 * number : 4 * number + 4]))
    feba, hgdc = state
    words = builder.add(message[0], keys)
    later = _call(builder, "llvm.x86.sha256rnds2", hgdc, feba, words)
    state = (
        _call(
            builder, "llvm.x86.sha256rnds2", feba, later, _pick(builder, words, words, [2, 3, 2, 3])
        ),
        later,
    )
    if number < 12:
        sums = builder.add(
            _call(builder, "llvm.x86.sha256msg1", message[0], message[1]),
            _pick(builder, message[2], message[3], [1, 2, 3, 4]),
        )
        message.append(_call(builder, "llvm.x86.sha256msg2", sums, message[3]))
    del message[0]
    return state


def _compress(builder: Any, states: list[Any], data: list[Any], blocks: Any) -> None:
    """Build the compression of as many blocks of each of some streams.

    Args:
        builder: of LLVM's instructions.
        states: addresses of eight words each, in the order of `_PLACES`.
        data: addresses of the blocks.
        blocks: how many of each.
    """
    pointer = _WORDS.as_pointer()
    places = [
        [
            builder.gep(builder.inttoptr(at, pointer), [ir.Constant(ir.IntType(64), i)])
            for i in (0, 1)
        ]
        for at in states
    ]
    begins = [builder.inttoptr(at, pointer) for at in data]
    kept = [
        [cgutils.alloca_once_value(builder, builder.load(at, align=4)) for at in pair]
        for pair in places
    ]
    with cgutils.for_range(builder, blocks) as loop:
        at = builder.mul(loop.index, ir.Constant(loop.index.type, BLOCK // 16))
        messages = [_load_message(builder, builder.gep(begin, [at])) for begin in begins]
        before = [(builder.load(pair[0]), builder.load(pair[1])) for pair in kept]
        after = list(before)
        for number in range(16):
            for k, message in enumerate(messages):  # by turns
                after[k] = _four_rounds(builder, after[k], message, number)
        for pair, old, now in zip(kept, before, after, strict=True):
            for place, a, b in zip(pair, old, now, strict=True):
                builder.store(builder.add(a, b), place)
    for at_pair, pair in zip(places, kept, strict=True):
        for at, place in zip(at_pair, pair, strict=True):
            builder.store(builder.load(place), at, align=4)


@intrinsic  # type: ignore[untyped-decorator]
def _compress_one(context: Any, state: Any, data: Any, blocks: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _compress(builder, [arguments[0]], [arguments[1]], arguments[2])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _compress_two(
    context: Any, state: Any, data: Any, other_state: Any, other_data: Any, blocks: Any
) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first, second = arguments[:2], arguments[2:4]
        _compress(builder, [first[0], second[0]], [first[1], second[1]], arguments[4])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@intrinsic  # type: ignore[untyped-decorator]
def _copy(context: Any, target: Any, source: Any, count: Any) -> Any:
    """Copy bytes between addresses."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, source = (builder.inttoptr(at, cgutils.voidptr_t) for at in arguments[:2])
        cgutils.raw_memcpy(builder, target, source, arguments[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@kernel
def _begin(state, rest, data, size):  # type: ignore[no-untyped-def]
    """Take data, but for whole blocks of it.

    Args:
        state: the address of a state's words, behind which its last, unfinished block is.
        rest: bytes of that block.
        data: the address of what follows.
        size: bytes of it.

    Returns:
        the address of the whole blocks, and how many there are.
    """
    last = state + STATE
    if rest:
        more = min(BLOCK - rest, size)
        _copy(last + rest, data, more)
        data, size = data + more, size - more
        if rest + more < BLOCK:
            return data, 0
        _compress_one(state, last, 1)
    blocks = size // BLOCK
    _copy(last, data + blocks * BLOCK, size - blocks * BLOCK)
    return data, blocks


@kernel
def _one(state, rest, data, size):  # type: ignore[no-untyped-def]
    """Take data; the arguments are those of `_begin`."""
    data, blocks = _begin(state, rest, data, size)
    _compress_one(state, data, blocks)


@kernel
def _two(state, rest, data, size, other_state, other_rest, other_data, other_size):  # type: ignore[no-untyped-def]
    """Take data of two streams."""
    data, blocks = _begin(state, rest, data, size)
    other_data, other_blocks = _begin(other_state, other_rest, other_data, other_size)
    both = min(blocks, other_blocks)
    _compress_two(state, data, other_state, other_data, both)
    _compress_one(state, data + both * BLOCK, blocks - both)
    _compress_one(other_state, other_data + both * BLOCK, other_blocks - both)
