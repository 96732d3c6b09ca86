"""Read and write the bytes of a place, whose rows may lie apart in the file."""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import as_strided

from kilodelta.export.patching.map import FilePlace, in_file
from kilodelta.files.copying import pread, pwrite
from kilodelta.files.tensor import Bytes


def rows_at(data: Bytes, place: FilePlace) -> Bytes:
    """View the rows of a place in bytes that begin with it, uint8 `(rows, bytes of a row)`.

    The view is of `data` itself: what is written to it is written there.
    """
    shape = (place.shape[0], place.row)
    return as_strided(data[: place.span], shape, (place.stride, 1))


def read_place(path: Path, place: FilePlace) -> Bytes:
    """Read the bytes of a place, uint8 `(n,)`, one row after the other.

    Raises:
        CheckpointError: the file cannot be read, or ends too soon.
    """
    data = pread(path, place.begin, place.span)
    return rows_at(data, place).reshape(-1) if place.stride else data


def write_place(descriptor: int, place: FilePlace, data: Bytes) -> None:
    """Write the bytes of a place, uint8 `(n,)`, and nothing that lies between its rows."""
    if not place.stride:
        pwrite(descriptor, data.data, place.begin)
        return
    for number in range(place.shape[0]):
        row = data[number * place.row : (number + 1) * place.row]
        pwrite(descriptor, row.data, place.begin + number * place.stride)


def put_place(target: Bytes, place: FilePlace, data: Bytes) -> None:
    """Write the bytes of a place into a file's bytes in memory."""
    own = target[place.begin : place.begin + place.span]
    if place.stride:
        rows_at(own, place)[:] = data.reshape(place.shape[0], place.row)
    else:
        own[:] = data


def columns(place: FilePlace, data: Bytes, shape: tuple[int, ...]) -> Bytes:
    """Return the columns that a place holds of a tensor's bytes, uint8 `(n,)`.

    Args:
        place: where they go.
        data: all of the tensor's bytes, in the dtype and orientation of the place.
        shape: the tensor's own.
    """
    if place.covers(shape):
        return data
    rows, _ = in_file(shape, transposed=place.transposed)
    size = data.size // max(1, prod(shape))
    begin = place.first * size
    part = data.reshape(rows, -1)[:, begin : begin + place.row]
    return np.ascontiguousarray(part).reshape(-1)
