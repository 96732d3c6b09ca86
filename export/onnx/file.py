"""The tensors of an ONNX file, found in its own bytes without the `onnx` package, trusting nothing.

Source of the field numbers: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kilodelta.errors import CheckpointError
from kilodelta.export.onnx.protobuf import BYTES, Data, Field, WireError, fields, text
from kilodelta.export.onnx.tensors import PackedWeight, Stored, read_tensor
from kilodelta.files.source import FileBytes, SourceFile

_GRAPH, _FUNCTIONS = 7, 25  # ModelProto
_NODE, _INITIALIZER = 1, 5  # GraphProto
_FUNCTION_NODE = 7  # FunctionProto
_INPUT, _OUTPUT, _ATTRIBUTE = 1, 2, 5  # NodeProto
_TENSOR, _SUBGRAPH, _TENSORS, _SUBGRAPHS = 5, 6, 10, 11  # AttributeProto

_FIX = "the file is damaged or not ONNX: export or fetch it again"


@dataclass(frozen=True, kw_only=True)
class OnnxFile:
    """What weights an ONNX file holds, external data included."""

    path: Path
    tensors: tuple[Stored, ...]
    packed: tuple[PackedWeight, ...]
    """Tensors of 4-bit integers; their names are among the sealed ones."""

    sealed: tuple[str, ...]
    """Tensors of other types, or whose bytes do not lie in one piece (written as varints)."""

    used: frozenset[str]
    """Names that feed a node."""


def read_onnx(path: Path) -> OnnxFile:
    """Find the tensors of an ONNX file; only headers are read.

    Raises:
        CheckpointError: it is damaged or no ONNX file, or external data are missing, too short or
            outside its folder; or it is cut meanwhile.
    """
    data = FileBytes(SourceFile(path))
    try:
        seen = scan(data, path.name)
    except WireError as problem:
        raise CheckpointError(f"{path} is not an ONNX file: {problem}", fix=_FIX) from None
    for tensor in seen.tensors:
        _check_place(path, tensor)
    for packed in seen.packed:
        _check_place(path, packed)
    return OnnxFile(
        path=path,
        tensors=tuple(seen.tensors),
        packed=tuple(seen.packed),
        sealed=tuple(seen.sealed),
        used=frozenset(seen.used),
    )


@dataclass
class Scan:
    """What is found while messages are walked."""

    tensors: list[Stored] = field(default_factory=list)
    packed: list[PackedWeight] = field(default_factory=list)
    sealed: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    def add(self, name: str, tensor: Stored | PackedWeight | None) -> None:
        if isinstance(tensor, Stored):
            self.tensors.append(tensor)
            return
        self.sealed.append(name)
        if tensor is not None:
            self.packed.append(tensor)


def scan(data: Data, main: str) -> Scan:
    """Walk a model's graph, its subgraphs and functions.

    Args:
        data: of the file.
        main: the file's name, for tensors that lie in it.

    Raises:
        WireError: the bytes are not a model.
    """
    seen, waiting, graphs = Scan(), [], 0
    for part in _messages(data, 0, len(data)):
        if part.number == _GRAPH:
            waiting += _graph(data, part, main, seen, top=True)
            graphs += 1
        elif part.number == _FUNCTIONS:
            for node in _messages(data, part.begin, part.end):
                if node.number == _FUNCTION_NODE:
                    waiting += _node(data, node, main, seen)
    if not graphs:
        raise WireError("it holds no graph")
    while waiting:
        waiting += _graph(data, waiting.pop(), main, seen, top=False)
    return seen


def _messages(data: Data, begin: int, end: int) -> Iterator[Field]:
    """Yield the fields that hold bytes: texts and messages."""
    return (part for part in fields(data, begin, end) if part.wire == BYTES)


def _graph(data: Data, graph: Field, main: str, seen: Scan, *, top: bool) -> list[Field]:
    """Take note of a graph's tensors and of what its nodes use; its subgraphs."""
    inner: list[Field] = []
    for part in _messages(data, graph.begin, graph.end):
        if part.number == _INITIALIZER:
            seen.add(*read_tensor(data, part, main, top=top))
        elif part.number == _NODE:
            inner += _node(data, part, main, seen)
    return inner


def _node(data: Data, node: Field, main: str, seen: Scan) -> list[Field]:
    """Take note of a node's inputs and constants; its subgraphs."""
    output, inner = "", []
    attributes: list[Field] = []
    for part in _messages(data, node.begin, node.end):
        if part.number == _INPUT:
            seen.used.add(text(data, part))
        elif part.number == _OUTPUT:
            output = output or text(data, part)
        elif part.number == _ATTRIBUTE:
            attributes += _messages(data, part.begin, part.end)
    for part in attributes:
        if part.number in (_TENSOR, _TENSORS):
            seen.add(*read_tensor(data, part, main, name=output))
        elif part.number in (_SUBGRAPH, _SUBGRAPHS):
            inner.append(part)
    return inner


def _check_place(path: Path, tensor: Stored | PackedWeight) -> None:
    place = path.parent / tensor.file
    if not place.is_file():
        raise CheckpointError(
            f"{path}: the data of {tensor.name} are to be in {tensor.file}, which is not there",
            fix="put the external data beside the model, under their own name",
        )
    size = place.stat().st_size
    if tensor.begin + tensor.nbytes > size:
        raise CheckpointError(
            f"{path}: the data of {tensor.name} end at byte {tensor.begin + tensor.nbytes} of "
            f"{tensor.file}, which has {size}",
            fix=_FIX,
        )
