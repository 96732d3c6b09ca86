"""Describe a model file: which bytes of it are which tensor of a base, and what proves it.

The map is made once, where the base checkpoint is (`make_map.py` for ONNX files, `engine/map.py`
for engines), and travels with the file as JSON (`map_file.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

from kilodelta.export.manifest.facts import FileFact
from kilodelta.files.dtypes import nbytes
from kilodelta.files.floats import lossless
from kilodelta.files.tensor import GRID, TensorInfo

if TYPE_CHECKING:
    from kilodelta.export.patching.codes.places import CodePlaces
    from kilodelta.merging.outline import Outline

ENGINE = ".engine"
"""How an engine's name ends; any other file is ONNX."""


@dataclass(frozen=True, kw_only=True)
class FilePlace:
    """Where a file holds a base tensor, or some columns of it.

    Attributes:
        name: the initializer's; in an engine the tensor's own.
        dtype, shape: of the values as they lie in the file.
        file: relative to the model's folder.
        begin: the offset of the first value, in bytes.
        transposed: the file holds the matrix the other way round.
        top: runtimes know it by its name, as an initializer of the main graph.
        stride: bytes from one row to the next, where a compiler has joined several matrices; 0
            where the values follow each other. With a stride `shape` is (rows, columns).
        first: with a stride, which column the place begins with, in the file's orientation.
        through: a dtype that values are rounded to before they are held in a wider `dtype`; empty
            for none.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    transposed: bool
    top: bool
    stride: int = 0
    first: int = 0
    through: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return nbytes(self.dtype, self.shape)

    @property
    def span(self) -> int:
        """Bytes from the first value to the end of the last, with what lies between rows."""
        if not self.stride:
            return self.nbytes
        return (self.shape[0] - 1) * self.stride + self.row

    @property
    def row(self) -> int:
        """Bytes of the values of one row, where there is a stride."""
        return nbytes(self.dtype, self.shape[1:])

    @property
    def rounding(self) -> str:
        """The narrowest dtype that values pass on their way into the file."""
        return self.through or self.dtype

    def covers(self, shape: tuple[int, ...]) -> bool:
        """Return whether all of a tensor of this shape is here, not only some of its columns."""
        return not self.stride or self.shape == in_file(shape, transposed=self.transposed)


def in_file(shape: tuple[int, ...], *, transposed: bool) -> tuple[int, int]:
    """Return (rows, columns) of a tensor that a file holds as a matrix.

    Example:
        >>> in_file((8, 4), transposed=True), in_file((8,), transposed=False)
        ((4, 8), (1, 8))
    """
    rows, columns = (shape[0], prod(shape[1:])) if len(shape) > 1 else (1, prod(shape))
    return (columns, rows) if transposed else (rows, columns)


@dataclass(frozen=True, kw_only=True)
class PatchMap:
    """Which bytes of an ONNX file or an engine are which tensor of a base.

    Attributes:
        files: the model itself, then its external data, by their names in its folder.
        root: the base's.
        tensors: all tensors of the base.
        digests: theirs; `root` is over them.
        places: where the file holds a tensor, more than once where an exporter copied it.
        refused: tensors that the file does not hold as they are, and what became of them.
        heads: tensors of the file that the base lacks or holds in another shape, and that every
            fine-tune brings; `places` of their names are theirs.
        unused: tensors that the model's outputs do not depend on.
        outline: what the base is where it is quantised, else None. `tensors` are then its stored
            ones, of which `places` has those that are no part of a quantised weight.
        codes: where the file holds each quantised weight, more than once where it has copies.
    """

    files: tuple[FileFact, ...]
    root: str
    tensors: Mapping[str, TensorInfo]
    digests: Mapping[str, str]
    places: Mapping[str, tuple[FilePlace, ...]]
    refused: Mapping[str, str]
    heads: Mapping[str, TensorInfo] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    outline: Outline | None = None
    codes: Mapping[str, tuple[CodePlaces, ...]] = field(default_factory=dict)

    @property
    def changeable(self) -> tuple[TensorInfo, ...]:
        """What a delta may change: all tensors, and of a quantised base its weights."""
        if self.outline is None:
            return tuple(self.tensors.values())
        return self.outline.infos(self.tensors)

    def info(self, name: str) -> TensorInfo | None:
        """Return what a tensor is in the file's architecture; None for one that is unknown."""
        if name in self.heads:
            return self.heads[name]
        if self.outline is not None and name in self.outline.shapes:
            return TensorInfo(name=name, dtype=GRID, shape=self.outline.shapes[name])
        return self.tensors.get(name)

    def exact(self, name: str) -> FilePlace | None:
        """Find a place from which a base tensor's own bytes can be read back, or None."""
        if name in self.heads:
            return None
        dtype, shape = self.tensors[name].dtype, self.tensors[name].shape
        whole = (p for p in self.places.get(name, ()) if p.covers(shape))
        return next((p for p in whole if lossless(dtype, p.rounding)), None)

    @property
    def kind(self) -> str:
        """What the map is of, for messages."""
        return "engine" if self.files[0].file.endswith(ENGINE) else "ONNX file"
