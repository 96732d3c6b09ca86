"""Find the quantised weights of a base in an ONNX graph, by their numbers.

A graph may cut blocks otherwise than the base, name a weight anew, or hold it twice (an embedding
and the head tied to it). So what counts is the logical digest of the base's own blocks; a name only
chooses between weights whose numbers are equal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from kilodelta.export.onnx.file import OnnxFile
from kilodelta.export.onnx.tensors import PackedWeight
from kilodelta.export.onnx.tensors import Stored as StoredBytes
from kilodelta.export.patching.codes.json_text import TYPES
from kilodelta.export.patching.codes.places import CodePlaces
from kilodelta.export.patching.map import FilePlace
from kilodelta.files.tensor import Bytes, TensorInfo
from kilodelta.grid.identity import matrix_digest
from kilodelta.grid.layouts import DequantizeLinear
from kilodelta.grid.matrix import Matrix
from kilodelta.grid.model import QuantisedModel, Stored
from kilodelta.grid.onnx_graph import every_copy
from kilodelta.grid.onnx_source import OnnxSource
from kilodelta.merging.outline import Outline

Piece: TypeAlias = StoredBytes | PackedWeight
"""A tensor whose bytes lie in one piece."""


def find_codes(
    file: OnnxFile, base: QuantisedModel, outline: Outline
) -> tuple[dict[str, tuple[CodePlaces, ...]], dict[str, str]]:
    """Find where a graph holds the weights of a quantised base.

    Args:
        file: the graph.
        base: the quantised model that it was exported from.
        outline: of that model.

    Returns:
        the copies of each weight that the graph holds, and the reasons for the others.

    Raises:
        CheckpointError: one of the two cannot be read.
        MissingPackageError: `onnx` is not installed.
    """
    source = OnnxSource(file.path)
    pieces: tuple[Piece, ...] = (*file.tensors, *file.packed)
    held = {tensor.name: tensor for tensor in pieces}
    by_numbers: dict[str, list[Stored]] = {}
    for weight in every_copy(source):
        by_numbers.setdefault(_numbers(_matrix(source, weight)), []).append(weight)
    places: dict[str, tuple[CodePlaces, ...]] = {}
    refused: dict[str, str] = {}
    claimed: dict[str, list[str]] = {}
    for name in base.stored:
        own = base.matrix(name)
        found = [
            weight
            for weight in by_numbers.get(_numbers(own), ())
            if _is_same(_matrix(source, weight), own, name, outline)
        ]
        for weight in found:
            claimed.setdefault(weight.codes, []).append(name)
        copies = tuple(_copy(source, weight, held, own) for weight in found)
        if not copies:
            refused[name] = "no operator of the graph holds its codes and scales"
        elif None in copies:
            refused[name] = "its codes are not kept in one piece of bytes, or in a type of 2 bits"
        else:
            places[name] = tuple(copy for copy in copies if copy is not None)
    for names in claimed.values():
        for name in names if len(names) > 1 else ():
            places.pop(name, None)
            others = ", ".join(other for other in names if other != name)
            refused[name] = f"its codes and scales equal those of {others}"
    return places, refused


def _matrix(source: OnnxSource, weight: Stored) -> Matrix:
    parts = {role: source.raw(place) for role, place in weight.parts.items()}
    return weight.layout.unpack(parts).checked(weight.name)


def _numbers(matrix: Matrix) -> str:
    """Digest what every cut of a weight into blocks has in common: its codes."""
    state = hashlib.sha256(f"{matrix.kind.name} {matrix.shape}".encode())
    state.update(np.ascontiguousarray(matrix.kind.plus_zero(matrix.codes)).data)
    return state.hexdigest()


def _is_same(found: Matrix, own: Matrix, name: str, outline: Outline) -> bool:
    whole = found.in_blocks(own.block)
    return whole is not None and matrix_digest(name, whole) == outline.digests[name]


def _copy(
    source: OnnxSource, stored: Stored, held: Mapping[str, Piece], own: Matrix
) -> CodePlaces | None:
    """Describe where a graph's weight lies; None where a part is in no one piece of bytes."""
    layout = stored.layout
    lies = all(part in held for part in stored.parts.values())
    if not lies or (isinstance(layout, DequantizeLinear) and layout.type not in TYPES):
        return None
    return CodePlaces(
        layout=layout,
        block=own.block,
        parts={role: _place(source, held[part]) for role, part in stored.parts.items()},
    )


def _place(source: OnnxSource, tensor: Piece) -> FilePlace:
    raw = source.info(tensor.name)
    return FilePlace(
        name=tensor.name,
        dtype=raw.dtype,
        shape=raw.shape,
        file=tensor.file,
        begin=tensor.begin,
        transposed=False,
        top=isinstance(tensor, StoredBytes) and tensor.top and raw.shape == tensor.shape,
    )


@dataclass(frozen=True)
class ExactValues:
    """The values of a quantised base as float32 tensors, read one weight at a time.

    Attributes:
        base: the quantised model.
    """

    base: QuantisedModel

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the quantised weights."""
        return tuple(self.base.stored)

    def info(self, name: str) -> TensorInfo:
        """Return a weight's shape, as float32."""
        return TensorInfo(name=name, dtype="F32", shape=self.base.of(name).shape)

    def data(self, name: str) -> Bytes:
        """Compute a weight's values, rounded to float32: uint8 (n,)."""
        values = self.base.matrix(name).values().astype(np.float32)
        return values.reshape(-1).view(np.uint8)
