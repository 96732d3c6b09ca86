"""Bring a changed tensor, which comes part by part, into the form that each of its places holds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from kilodelta.export.merge.tensor import rounded
from kilodelta.export.patching.map import FilePlace, in_file
from kilodelta.files.dtypes import nbytes
from kilodelta.files.floats import cast
from kilodelta.files.tensor import Bytes, RawTensor, TensorInfo

BLOCK = 16
"""Rows transposed at a time, whose columns then lie in the nearest cache."""


Memory = Callable[[int], Bytes]


def fresh(count: int) -> Bytes:
    """Return new memory, uint8 `(count,)`."""
    return np.empty(count, np.uint8)


class Reused:
    """Memory that a thread uses again for the next tensor: the kernel clears new pages first."""

    def __init__(self) -> None:
        self._own = threading.local()

    def begin(self) -> None:
        """Take back what this thread was given."""
        self._own.free = getattr(self._own, "held", [])
        self._own.held = []

    def __call__(self, count: int) -> Bytes:
        """Return memory of this thread, uint8 `(count,)`, until its next `begin`."""
        old = self._own.free.pop() if self._own.free else fresh(count)
        held = old if old.size >= count else fresh(count)
        self._own.held.append(held)
        return held[:count]


class PlacedBytes:
    """The bytes of a tensor's places, filled while its parts come.

    Args:
        info: the tensor.
        places: where a file holds it.
        memory: gives uint8 `(n,)` for each of them.
    """

    def __init__(
        self, info: TensorInfo, places: Sequence[FilePlace], memory: Memory = fresh
    ) -> None:
        self._info = info
        self._held = [(place, memory(place.nbytes)) for place in places]
        self._columns = in_file(info.shape, transposed=False)[1]
        self._row = 0

    def add(self, part: Bytes) -> None:
        """Take the next whole rows of the tensor, uint8 `(n,)`, which may be overwritten later.

        Raises:
            ExportError: a finite value does not fit into a place's dtype.
        """
        info = self._info
        rows = part.size // max(1, nbytes(info.dtype, (self._columns,)))
        if part.size == info.nbytes:  # all of it, and rows of a type of four bits may share a byte
            rows = in_file(info.shape, transposed=False)[0]
        tensor = RawTensor(dtype=info.dtype, shape=(rows, self._columns), data=part)
        for place, held in self._held:
            values = cast(rounded(info.name, tensor, place.rounding), place.rounding, place.dtype)
            if place.transposed or not place.covers(info.shape):
                self._put(place, held, values.reshape(rows, self._columns, -1))
            else:
                begin = self._row * (values.size // max(1, rows))
                held[begin : begin + values.size] = values
        self._row += rows

    def _put(self, place: FilePlace, held: Bytes, values: Bytes) -> None:
        """Put rows, uint8 `(rows, columns, bytes of an element)`, into a part of a matrix."""
        element = f"u{values.shape[2]}"
        matrix = values.view(element)[..., 0]
        shape = place.shape if place.stride else in_file(self._info.shape, transposed=True)
        target = held.view(element).reshape(shape)
        if not place.transposed:
            own = slice(place.first, place.first + shape[1])
            target[self._row : self._row + len(matrix)] = matrix[:, own]
            return
        begin = max(0, place.first - self._row)
        end = min(len(matrix), place.first + shape[1] - self._row)
        offset = self._row - place.first
        for top in range(begin, end, BLOCK):
            bottom = min(end, top + BLOCK)
            target[:, top + offset : bottom + offset] = matrix[top:bottom].T

    def finished(self) -> Iterator[tuple[FilePlace, Bytes]]:
        """Yield each place with its bytes, uint8 `(n,)`, once all parts were added."""
        yield from self._held
