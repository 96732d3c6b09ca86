"""Find base tensors in an ONNX file by their bytes: as stored or transposed, in its precisions.

Exporters rename, transpose, copy, merge and fold weights, and no name tells; bytes do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from kilodelta import parallel
from kilodelta.export.onnx.file import OnnxFile
from kilodelta.export.onnx.tensors import Stored
from kilodelta.export.patching.map import FilePlace
from kilodelta.files.copying import pread
from kilodelta.files.floats import cast, castable, transposed
from kilodelta.files.tensor import RawTensor
from kilodelta.progress import Meter, Progress

Bytes = npt.NDArray[np.uint8]
Content = tuple[str, bytes]
"""A dtype, and the SHA-256 of raw bytes."""


@dataclass(frozen=True, kw_only=True)
class Match:
    """Where a file holds the bytes of one tensor.

    `constant` says that all its elements are equal, `symmetric` that it reads the same transposed.
    """

    name: str
    places: tuple[FilePlace, ...]
    constant: bool
    symmetric: bool


def match_all(
    file: OnnxFile,
    tensors: Mapping[str, RawTensor],
    threads: int | None,
    progress: Progress,
) -> list[Match]:
    """Return a match for every tensor, in the order given.

    Args:
        file: the ONNX file.
        tensors: what to look for, by name; mapped bytes are read once.
        threads: cores to use; all by default.
        progress: called with how far the work is, in bytes.
    """
    contents = _contents(file, threads, progress)
    meter = Meter("match", sum(tensor.nbytes for tensor in tensors.values()), "B", progress)

    def match(name: str) -> Match:
        tensor = tensors[name]
        places = tuple(_places(tensor, contents))
        meter.add(tensor.nbytes)
        return _match(name, tensor, places)

    names = list(tensors)
    return parallel.run(match, names, meter, weight=lambda n: tensors[n].nbytes, threads=threads)


def _contents(
    file: OnnxFile, threads: int | None, progress: Progress
) -> dict[Content, list[Stored]]:
    """Index the file's tensors that feed a node by their content."""
    tensors = [tensor for tensor in file.tensors if tensor.name in file.used]
    meter = Meter("scan", sum(tensor.nbytes for tensor in tensors), "B", progress)

    def content(tensor: Stored) -> Content:
        data = pread(file.path.parent / tensor.file, tensor.begin, tensor.nbytes)
        meter.add(tensor.nbytes)
        return _content(tensor.dtype, data)

    prints = parallel.run(content, tensors, meter, weight=lambda t: t.nbytes, threads=threads)
    contents: dict[Content, list[Stored]] = {}
    for tensor, print_ in zip(tensors, prints, strict=True):
        contents.setdefault(print_, []).append(tensor)
    return contents


def _content(dtype: str, data: Bytes) -> Content:
    return dtype, hashlib.sha256(data.data).digest()


def _places(tensor: RawTensor, contents: Mapping[Content, list[Stored]]) -> Iterator[FilePlace]:
    sizes = {(stored.dtype, stored.nbytes) for own in contents.values() for stored in own}
    for dtype in sorted({dtype for dtype, _ in sizes if castable(tensor.dtype, dtype)}):
        values = cast(tensor.data, tensor.dtype, dtype)
        if (dtype, values.size) not in sizes:
            continue
        plain = _content(dtype, values)
        other = _content(dtype, transposed(values, tensor.shape))
        yield from (_place(stored, turned=False) for stored in contents.get(plain, ()))
        if other != plain:
            yield from (
                _place(stored, turned=True)
                for stored in contents.get(other, ())
                if stored.shape == tensor.shape[::-1]
            )


def _place(tensor: Stored, *, turned: bool) -> FilePlace:
    return FilePlace(
        name=tensor.name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        file=tensor.file,
        begin=tensor.begin,
        transposed=turned,
        top=tensor.top,
    )


def _match(name: str, tensor: RawTensor, places: tuple[FilePlace, ...]) -> Match:
    data, shape = tensor.data, tensor.shape
    elements = data.reshape(-1, max(1, data.size // max(1, prod(shape))))
    square = len(shape) == 2 and shape[0] == shape[1] > 1
    return Match(
        name=name,
        places=places,
        constant=not data.size or bool((elements == elements[0]).all()),
        symmetric=bool(places) and square and np.array_equal(transposed(data, shape), data),
    )
