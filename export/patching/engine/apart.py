"""Tell weights of equal values apart, which TensorRT-RTX 1.7 keeps once in an engine.

A base's layers may be copies of each other (a model made deeper by repeating layers, experts that
began as one), and a fine-tune changes them in different ways. The base's own build has no place for
the second of two equal weights, in codes as in floats. So what is built, mapped and proved is the
base with such weights made different; then the base's values are written into all their places.
That engine computes what the base does, and holds each weight for itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace

from kilodelta.errors import ExportError
from kilodelta.export.merge.tensor import rounded
from kilodelta.export.patching.codes.places import CodePlaces
from kilodelta.export.patching.engine.builds import EngineBuilds
from kilodelta.export.patching.engine.codes import packed
from kilodelta.export.patching.engine.places import written
from kilodelta.export.patching.engine.twin import Value, perturbed
from kilodelta.export.patching.map import FilePlace, PatchMap
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.grid.layouts import DequantizeLinear
from kilodelta.grid.matrix import Matrix
from kilodelta.grid.model import QuantisedModel

SEED = 1 << 20
"""Seeds of what is made here begin where no other use of `perturbed` comes."""

Group = tuple[str, ...]


def equals(tensors: Mapping[str, Value], dtype: str) -> list[Group]:
    """Return the groups of weights whose constants in a network are equal, in their order.

    Args:
        tensors: weights by name.
        dtype: the network's precision, such as "F16", to which floats are rounded.

    Raises:
        ExportError: a value does not fit into that precision.

    Example:
        >>> import numpy as np
        >>> from kilodelta.files.tensor import RawTensor
        >>> one, other = RawTensor.of(np.eye(2)), RawTensor.of(np.ones((2, 2)))
        >>> equals({"a": one, "b": other, "c": one}, "F32")
        [('a', 'c')]
    """
    found: dict[bytes, list[str]] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Matrix):
            kind, data = tensor.kind.name, packed(tensor, transposed=False)
        else:
            kind, data = dtype, rounded(name, tensor, dtype)
        state = hashlib.sha256(kind.encode())
        state.update(data.data)
        found.setdefault(state.digest(), []).append(name)
    return [tuple(names) for names in found.values() if len(names) > 1]


def told_apart(tensors: Mapping[str, Value], groups: Iterable[Group]) -> dict[str, Value]:
    """Make other values for all but the first weight of each group."""
    names = [name for group in groups for name in group[1:]]
    return {name: perturbed(tensors[name], SEED + seed) for seed, name in enumerate(names)}


def require_built(
    builds: EngineBuilds,
    patched: bytes,
    places: PatchMap,
    model: Checkpoint | QuantisedModel,
    dtype: str,
) -> None:
    """See that a patched engine is, in every byte, a build of the merged fine-tune.

    A fine-tune that leaves two equal weights alone is built with one of them made different, as
    the base was when its engine was mapped; that the patched engine has its own values there is
    seen by themselves.

    Args:
        builds: builds the fine-tune's engine.
        patched: the base's engine, patched.
        places: the map of the base's engine.
        model: the merged fine-tune.
        dtype: the network's precision, such as "F16".

    Raises:
        ExportError: it is none, or holds other values of a weight that equals another.
    """
    where = {**places.places, **{n: _file_places(own) for n, own in places.codes.items()}}
    own = {name: value_of(model, name) for name, found in where.items() if found}
    own = {name: tensor for name, tensor in own.items() if len(tensor.shape) > 1}
    apart = told_apart(own, equals(own, dtype))
    if written(patched, where, {name: own[name] for name in apart}) != patched:
        raise ExportError(
            f"the map is refuted: the patched engine holds other values of {', '.join(apart)}",
            fix="bundle again",
        )
    builds.require_build(apart, written(patched, where, apart), "this fine-tune")


def value_of(model: Checkpoint | QuantisedModel, name: str) -> Value:
    """Return a model's weight as an engine is given it: codes where it has them."""
    if isinstance(model, QuantisedModel):
        return model.matrix(name) if name in model.stored else model.source.raw(name)
    return model.raw(name)


def _file_places(copies: Iterable[CodePlaces]) -> tuple[FilePlace, ...]:
    """Return where the codes of copies lie, oriented as `find_codes` has it; none in the rest."""
    return tuple(
        replace(copy.codes, transposed=copy.layout.transposed)
        for copy in copies
        if copy.is_held and isinstance(copy.layout, DequantizeLinear)
    )
