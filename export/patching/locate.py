"""Find a tensor's values in bytes of no known format: whole, transposed, or joined with others.

A compiler that joins matrices (value | key | query) leaves each row in one piece and sets the rows
apart; one that splits a matrix leaves runs of its columns. So a tensor is looked for as a matrix,
in both orientations: where does a run of its first row stand, how far from it is the same run of
the second row, and do all other rows follow? The values should be random ones, for then eight bytes
of them tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

import numpy as np

from kilodelta.export.patching.map import FilePlace, in_file
from kilodelta.export.patching.strided import rows_at
from kilodelta.files.floats import cast, castable, transposed
from kilodelta.files.tensor import Bytes, RawTensor

RUN = 8
"""Bytes that are looked for, and the fewest of a row that are taken for a part of it."""
CANDIDATES = 64
"""Occurrences of a run that are looked at: more than that are no random values."""
DTYPES = ("F32", "F16", "BF16")


def find_places(
    held: bytes, name: str, tensor: RawTensor, dtype: str, file: str
) -> tuple[FilePlace, ...] | None:
    """Find all places of a tensor in a file's bytes.

    Args:
        held: the file's bytes.
        name: the tensor's, which the places get.
        tensor: its values: random ones, that every precision holds exactly.
        dtype: the precision of the network that the file was built from; values in a wider one
            were rounded to it before.
        file: the file's name, which the places get.

    Returns:
        The places; None where only a part of the tensor is there, in one of its orientations.

    Example:
        >>> values = np.arange(1, 13, dtype=np.float32)
        >>> joined = np.hstack([np.zeros((4, 2), np.float32), values.reshape(3, 4).T])
        >>> tensor = RawTensor.of(values.reshape(3, 4))
        >>> [one] = find_places(joined.tobytes(), "w", tensor, "F32", "m.engine")
        >>> one.begin, one.shape, one.stride, one.transposed
        (8, (4, 3), 20, True)
    """
    places: list[FilePlace] = []
    for kind in DTYPES:
        if not castable(tensor.dtype, kind):
            continue
        values = cast(tensor.data, tensor.dtype, kind)
        turns = (False, True) if len(tensor.shape) == 2 and min(tensor.shape) > 1 else (False,)
        for turned in turns:
            blank = FilePlace(
                name=name,
                dtype=kind,
                shape=tensor.shape[::-1] if turned else tensor.shape,
                file=file,
                begin=0,
                transposed=turned,
                top=False,
                through=dtype if kind == "F32" and dtype != "F32" else "",
            )
            own = _in_orientation(held, blank, values, tensor.shape)
            if own is None:
                return None
            places += own
    return tuple(places)


def _in_orientation(
    held: bytes, blank: FilePlace, values: Bytes, shape: tuple[int, ...]
) -> list[FilePlace] | None:
    """Find the places of a tensor, upright or transposed; None where they cover a part only."""
    data = transposed(values, shape) if blank.transposed else values
    whole = data.tobytes()
    contiguous = [replace(blank, begin=begin) for begin in occurrences(held, whole)]
    if contiguous:
        return contiguous
    rows, columns = in_file(shape, transposed=blank.transposed)
    matrix = data.reshape(rows, -1)
    size = matrix.shape[1] // columns
    parts: list[FilePlace] = []
    first = 0
    while first < columns:
        blocks = list(_blocks(held, matrix[:, first * size :], size))
        if not blocks:
            return None if parts else []
        width = min(block[2] for block in blocks)
        parts += [
            replace(blank, begin=begin, shape=(rows, width), stride=stride, first=first)
            for begin, stride, _ in blocks
        ]
        first += width
    return parts


def _blocks(held: bytes, matrix: Bytes, size: int) -> Iterator[tuple[int, int, int]]:
    """Find where the first columns of a matrix lie: offset, stride, and how many columns.

    Args:
        held: the file's bytes.
        matrix: uint8 `(rows, bytes of a row)`.
        size: bytes of a value.
    """
    rows, length = matrix.shape
    run = min(RUN, length)
    if run < RUN:
        return
    seconds = [] if rows == 1 else occurrences(held, matrix[1, :run].tobytes())
    for begin in occurrences(held, matrix[0, :run].tobytes()):
        strides = [length] if rows == 1 else [s - begin for s in seconds if s >= begin + run]
        for stride in strides:
            width = _width(held, matrix, begin, stride) // size
            if width * size >= RUN:
                yield begin, stride, width
                break


def _width(held: bytes, matrix: Bytes, begin: int, stride: int) -> int:
    """Return how many bytes of every row lie at an offset, row by row at a stride."""
    rows, length = matrix.shape
    length = min(length, stride)
    if begin + (rows - 1) * stride + length > len(held):
        return 0
    span = (rows - 1) * stride + length
    data = np.frombuffer(held, np.uint8, span, begin)
    strided = np.lib.stride_tricks.as_strided(data, (rows, length), (stride, 1))
    equal = (strided == matrix[:, :length]).all(axis=0)
    return length if equal.all() else int(equal.argmin())


def occurrences(held: bytes, run: bytes) -> list[int]:
    """Return the offsets of a run of bytes, the first `CANDIDATES` of them."""
    begins: list[int] = []
    begin = held.find(run)
    while begin >= 0 and len(begins) < CANDIDATES:
        begins.append(begin)
        begin = held.find(run, begin + 1)
    return begins


def holds(held: bytes, place: FilePlace, values: Bytes) -> bool:
    """Return whether a file holds these bytes at a place, uint8 `(n,)`."""
    data = np.frombuffer(held, np.uint8)[place.begin : place.begin + place.span]
    if data.size < place.span:
        return False
    return np.array_equal(rows_at(data, place).reshape(-1) if place.stride else data, values)


def fewest_bytes(tensor: RawTensor) -> int:
    """Return how many bytes a tensor takes in the narrowest float type."""
    return 2 * prod(tensor.shape)
