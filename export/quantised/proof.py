"""Prove that a graph that was written holds exactly the codes, scales and zero points it should."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kilodelta.errors import ProofError
from kilodelta.grid.matrix import Matrix
from kilodelta.grid.model import QuantisedModel
from kilodelta.grid.onnx_graph import open_onnx


def prove_codes(path: Path, merged: QuantisedModel, names: Collection[str]) -> None:
    """Read every quantised weight back from an ONNX file.

    Args:
        path: the file, with its external data beside it.
        merged: the quantised model that the graph was made from.
        names: the weights that the graph holds as codes.

    Raises:
        ProofError: one is missing or another.
        CheckpointError: the file cannot be read.
    """
    graph = open_onnx(path)
    for name in names:
        wrong = (
            "is not there" if name not in graph.stored
            else _difference(graph.matrix(name), merged.matrix(name))
        )  # fmt: skip
        if wrong:
            raise ProofError(
                f"{path.name}: {name} {wrong}",
                fix="this is a fault of kilodelta: please report it with the architecture's name",
            )


def _difference(ours: Matrix, theirs: Matrix) -> str:
    """Say what differs; empty if nothing. Blocks may be cut otherwise, so each weight counts."""
    if ours.kind.name != theirs.kind.name or not np.array_equal(ours.codes, theirs.codes):
        return "has other codes"
    if not np.array_equal(ours.spread(ours.steps), theirs.spread(theirs.steps)):
        return "has other scales"
    if not np.array_equal(_spread(ours, ours.minima), _spread(theirs, theirs.minima)):
        return "has other minima"
    same = np.array_equal(_spread(ours, ours.zeros), _spread(theirs, theirs.zeros))
    return "" if same else "has other zero points"


def _spread(matrix: Matrix, values: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
    """Return the zero point, or minimum, of each weight."""
    return np.zeros(matrix.shape) if values is None else matrix.spread(values)
