"""Finding the base's tensors among those of an ONNX file, by content: by their bytes, in their own
layout and transposed, in the precisions of the file.

Exporters rename, transpose, copy, merge and fold weights, and no name tells; bytes do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kilodelta import parallel
from kilodelta.export.onnx.file import OnnxFile
from kilodelta.export.onnx.tensors import Stored
from kilodelta.export.patching.map import Place
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.copying import pread
from kilodelta.files.floats import cast, castable, transposed
from kilodelta.files.tensor import TensorInfo
from kilodelta.progress import Meter, Progress

Bytes = npt.NDArray[np.uint8]
Content = tuple[str, bytes]
"""A dtype, and the SHA-256 of raw bytes."""


@dataclass(frozen=True, kw_only=True)
class Match:
    """Where a file holds the bytes of one base tensor.

    `constant` says that all its elements are equal, `symmetric` that it reads the same transposed.
    """

    name: str
    places: tuple[Place, ...]
    constant: bool
    symmetric: bool


def match_all(
    found: OnnxFile, checkpoint: Checkpoint, threads: int | None, progress: Progress
) -> list[Match]:
    """A match for every tensor of the base, in name order."""
    contents = _contents(found, threads, progress)
    infos = [checkpoint.info(name) for name in checkpoint.names]
    meter = Meter("match", sum(info.nbytes for info in infos), "B", progress)

    def match(info: TensorInfo) -> Match:
        places = tuple(_places(info, checkpoint.data(info.name), contents))
        meter.add(info.nbytes)
        return _match(info, checkpoint.data(info.name), places)

    return parallel.run(match, infos, meter, weight=lambda info: info.nbytes, threads=threads)


def _contents(
    found: OnnxFile, threads: int | None, progress: Progress
) -> dict[Content, list[Stored]]:
    """The file's tensors that feed a node, by content."""
    tensors = [tensor for tensor in found.tensors if tensor.name in found.used]
    meter = Meter("scan", sum(tensor.nbytes for tensor in tensors), "B", progress)

    def content(tensor: Stored) -> Content:
        data = pread(found.path.parent / tensor.file, tensor.begin, tensor.nbytes)
        meter.add(tensor.nbytes)
        return _content(tensor.dtype, data)

    prints = parallel.run(content, tensors, meter, weight=lambda t: t.nbytes, threads=threads)
    contents: dict[Content, list[Stored]] = {}
    for tensor, print_ in zip(tensors, prints, strict=True):
        contents.setdefault(print_, []).append(tensor)
    return contents


def _content(dtype: str, data: Bytes) -> Content:
    return dtype, hashlib.sha256(data.data).digest()


def _places(
    info: TensorInfo, data: Bytes, contents: Mapping[Content, list[Stored]]
) -> Iterator[Place]:
    sizes = {(tensor.dtype, tensor.nbytes) for own in contents.values() for tensor in own}
    for dtype in sorted({dtype for dtype, _ in sizes if castable(info.dtype, dtype)}):
        values = cast(data, info.dtype, dtype)
        if (dtype, values.size) not in sizes:
            continue
        plain = _content(dtype, values)
        other = _content(dtype, transposed(values, info.shape))
        yield from (_place(tensor, turned=False) for tensor in contents.get(plain, ()))
        if other != plain:
            yield from (
                _place(tensor, turned=True)
                for tensor in contents.get(other, ())
                if tensor.shape == info.shape[::-1]
            )


def _place(tensor: Stored, *, turned: bool) -> Place:
    return Place(
        name=tensor.name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        file=tensor.file,
        begin=tensor.begin,
        transposed=turned,
        top=tensor.top,
    )


def _match(info: TensorInfo, data: Bytes, places: tuple[Place, ...]) -> Match:
    elements = data.reshape(-1, max(1, data.size // max(1, int(np.prod(info.shape)))))
    square = len(info.shape) == 2 and info.shape[0] == info.shape[1] > 1
    return Match(
        name=info.name,
        places=places,
        constant=not data.size or bool((elements == elements[0]).all()),
        symmetric=bool(places) and square and np.array_equal(transposed(data, info.shape), data),
    )
