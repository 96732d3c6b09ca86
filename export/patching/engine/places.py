"""Look for weights in an engine's bytes, and write others into their places."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from kilodelta.export.merge.tensor import rounded
from kilodelta.export.patching.engine.codes import find_codes, packed
from kilodelta.export.patching.engine.twin import Value
from kilodelta.export.patching.locate import find_places, holds
from kilodelta.export.patching.map import FilePlace, in_file
from kilodelta.export.patching.strided import columns, put_place
from kilodelta.files.dtypes import FLOATS
from kilodelta.files.floats import cast, transposed
from kilodelta.files.tensor import Bytes
from kilodelta.grid.matrix import Matrix

NO_VALUES = "its values are nowhere: TensorRT folded, quantised or reordered them"
NO_CODES = "its codes are nowhere: TensorRT unpacked or reordered them"
OTHERWISE = "TensorRT lays it out otherwise where its values are others"

STATED_VALUES = 3
"""Values that are looked for in an engine's texts."""


def is_stated(engine: bytes, tensor: Value) -> bool:
    """Return whether an engine's texts state the first values of a tensor; of codes they do not.

    TensorRT-RTX 1.7 keeps the sources of its kernels, with comments such as
    `__mye39274_dconst-{1.16406, 1.23926, 1.43359, 0.653809, ...}` on constants that were fused into
    them. The length of such a text, and with it every offset behind it, follows the values.
    """
    if isinstance(tensor, Matrix):
        return False
    values = (
        FLOATS[tensor.dtype].widen(tensor.data).reshape(in_file(tensor.shape, transposed=False))
    )
    for orientation in (values, values.T):
        text = ", ".join(f"{value:g}" for value in orientation.reshape(-1)[:STATED_VALUES])
        if b"{" + text.encode() in engine:
            return True
    return False


def difference(built: bytes, patched: bytes) -> str:
    """Say in how many bytes two engines differ, and where the first one is.

    Example:
        >>> difference(b"engine", b"eNgiNe")
        '2 of 6 bytes differ, the first at 1'
    """
    if len(built) != len(patched):
        return f"a build has {len(built)} bytes, the patched engine {len(patched)}"
    one, other = np.frombuffer(built, np.uint8), np.frombuffer(patched, np.uint8)
    wrong = np.flatnonzero(one != other)
    return f"{wrong.size} of {len(built)} bytes differ, the first at {wrong[0]}"


def written(
    held: bytes, places: Mapping[str, tuple[FilePlace, ...]], tensors: Mapping[str, Value]
) -> bytes:
    """Return an engine's bytes with these tensors in their places."""
    data = np.frombuffer(held, np.uint8).copy()
    for name, tensor in tensors.items():
        for place, values in _as_placed(name, tensor, places[name]):
            put_place(data, place, values)
    return data.tobytes()


def _as_placed(
    name: str, tensor: Value, places: tuple[FilePlace, ...]
) -> Iterator[tuple[FilePlace, Bytes]]:
    for place in places:
        if isinstance(tensor, Matrix):
            yield place, packed(tensor, transposed=place.transposed)
            continue
        values = cast(rounded(name, tensor, place.rounding), place.rounding, place.dtype)
        turned = transposed(values, tensor.shape) if place.transposed else values
        yield place, columns(place, turned, tensor.shape)


def located(
    held: bytes,
    twin_engine: bytes,
    twin: Mapping[str, Value],
    own: Mapping[str, Value],
    dtype: str,
    file: str,
) -> tuple[dict[str, tuple[FilePlace, ...]], dict[str, str]]:
    """Find the places of the twin's tensors at which the base's engine holds the base's values.

    Args:
        held: the base's engine.
        twin_engine: the engine of the twin.
        twin, own: the twin's tensors and the base's, by name.
        dtype: of the network.
        file: the engine's name in the device folder.

    Returns:
        The places by name, and by name why a tensor has none.
    """
    places: dict[str, tuple[FilePlace, ...]] = {}
    refused: dict[str, str] = {}
    for name, tensor in twin.items():
        found: tuple[FilePlace, ...] | None
        if isinstance(tensor, Matrix):
            found = find_codes(twin_engine, name, tensor, file)
        else:
            found = find_places(twin_engine, name, tensor, dtype, file)
        if found is None:
            refused[name] = "only some of its columns stand in the engine as they are"
        elif not found:
            refused[name] = NO_CODES if isinstance(tensor, Matrix) else NO_VALUES
        elif not all(holds(held, p, v) for p, v in _as_placed(name, own[name], found)):
            refused[name] = OTHERWISE
        else:
            places[name] = found
    return places, refused
