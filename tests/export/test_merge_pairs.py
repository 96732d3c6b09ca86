"""Two tensors by turns in one thread."""

from __future__ import annotations

import hashlib
from collections.abc import Generator

import numpy as np
import pytest

from kilodelta.exact import sha256
from kilodelta.export.merge.pairs import Hashing, finish, paired
from kilodelta.files.identity import Hash

DATA = np.random.default_rng(0).integers(0, 256, 1000, np.uint8).tobytes()


def hashing(data: bytes, parts: list[int], trace: list[str], name: str) -> Hashing[str]:
    """Hash data in parts whose buffer is overwritten as soon as it may be."""
    state, buffer, begin = sha256.new(), bytearray(len(data)), 0
    for size in parts:
        buffer[:size] = data[begin : begin + size]
        yield state, memoryview(buffer)[:size]
        buffer[:] = bytes(len(buffer))
        begin += size
        trace.append(name)
    return state.hexdigest()


@pytest.mark.parametrize(
    "parts",
    [
        ([1000], [1000]),
        ([100] * 10, [500, 500]),
        ([0, 7, 0, 993], [64, 0]),
        ([], [999]),
        ([3] * 300, []),
    ],
)
def test_each_takes_its_own_bytes(parts: tuple[list[int], list[int]]) -> None:
    data = DATA[::-1]
    trace: list[str] = []
    done = finish([hashing(DATA, parts[0], trace, "a"), hashing(data, parts[1], trace, "b")])
    assert done == [
        hashlib.sha256(DATA[: sum(parts[0])]).hexdigest(),
        hashlib.sha256(data[: sum(parts[1])]).hexdigest(),
    ]
    assert sorted(trace) == ["a"] * len(parts[0]) + ["b"] * len(parts[1])


def test_they_take_turns() -> None:
    trace: list[str] = []
    finish([hashing(DATA, [200] * 5, trace, "a"), hashing(DATA, [200] * 5, trace, "b")])
    assert "".join(trace) == "ab" * 5


def test_one_alone() -> None:
    assert finish([hashing(DATA, [400, 600], [], "a")]) == [hashlib.sha256(DATA).hexdigest()]


def test_a_fault_in_one_ends_both() -> None:
    ended = []

    def endless() -> Generator[tuple[Hash, bytes], None, str]:
        try:
            while True:
                yield sha256.new(), DATA
        finally:
            ended.append(True)

    def fails() -> Generator[tuple[Hash, bytes], None, str]:
        yield sha256.new(), DATA
        raise ValueError("the disk is full")

    with pytest.raises(ValueError, match="the disk is full"):
        finish([endless(), fails()])
    assert ended


def test_pairs_are_of_like_weight_and_leave_no_thread_idle() -> None:
    def of(weights: list[int], threads: int, fits: int = 99) -> list[tuple[int, ...]]:
        return paired(weights, lambda w: w, lambda w: w <= fits, threads)

    assert of([1, 8, 8, 1, 8, 8], 2) == [(8, 8), (8, 8), (1, 1)]
    assert of([8, 8], 2) == [(8,), (8,)]  # together they would be all there is for two
    assert of([8, 8], 1) == [(8, 8)]
    assert of([9, 3, 3, 3], 2) == [(9,), (3, 3), (3,)]
    assert of([9, 3, 3], 1, fits=5) == [(9,), (3, 3)]  # what is read whole stays alone
    assert of([], 2) == []
