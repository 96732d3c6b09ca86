"""Find weights of an ONNX file that were computed from a base tensor: quantised, scaled or folded.

Such a copy is not the tensor's bytes, so patching cannot write it, and it would keep the base's
values beside the patched ones: a tied embedding whose head is int4, a head that took a norm's gain.

A copy's numbers follow the tensor's along one axis at least, up to a factor: per tensor, per
channel, or per block of a block-quantised weight, where it may even be negative. So short runs of
both are compared by their correlation, which is near 1 for a copy and near 0 for other weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kilodelta.export.onnx.tensors import PackedWeight, Stored
from kilodelta.files.copying import pread
from kilodelta.files.dtypes import FLOATS, TARGETS
from kilodelta.files.tensor import Bytes, TensorInfo

RUN = 16
"""Numbers in a run: no more than the smallest block of usual quantisations."""
RUNS = 256
"""Runs compared along each axis."""
ALIKE = 0.6
"""Median correlation of a copy; 0.98 for int4, 0.8 for 2 bits, 0.17 for weights of no relation."""
PADDING = 256
"""Rows or columns that a copy may have more: vocabularies and blocks are filled up."""
SMALLEST = 8
"""Numbers along an axis below which a correlation says nothing."""

Matrix = npt.NDArray[Any]
Runs = Callable[[Matrix, Matrix], npt.NDArray[np.float64]]
"""From row and column numbers, (n, RUN) each, to the numbers there."""


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """A tensor as a matrix of numbers that are read where they are asked for."""

    rows: int
    columns: int
    at: Runs


class Values(Protocol):
    """Tensors by name: a `Checkpoint`, or what a quantised base stands for."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def info(self, name: str) -> TensorInfo: ...

    def data(self, name: str) -> Bytes: ...


def find_derived(
    base: Values,
    names: Iterable[str],
    folder: Path,
    foreign: Sequence[Stored | PackedWeight],
) -> dict[str, list[str]]:
    """Find the weights of a file that are copies of base tensors in another form.

    Args:
        base: the checkpoint, or the values of a quantised one.
        names: its tensors that the file holds as they are.
        folder: of the file, for external data.
        foreign: the file's weights that hold no base tensor as it is.

    Returns:
        For each of `names` that has copies, their names in the file.
    """
    held = [base.info(name) for name in names if _is_matrix(base.info(name))]
    others = [base.info(name) for name in base.names if _is_matrix(base.info(name))]
    derived: dict[str, list[str]] = {}
    for tensor in foreign:
        for grid in _grids(folder, tensor):
            scores = {info.name: _likeness(base, info, grid) for info in held}
            best = max(scores.values(), default=0.0)
            if best < ALIKE:
                continue
            # a near copy of a held tensor may be the true source: a layer that began as its twin
            best = max(best, *(_likeness(base, info, grid) for info in others))
            for name, score in scores.items():
                if score >= best:
                    derived.setdefault(name, []).append(tensor.name)
            break
    return derived


def _is_matrix(info: TensorInfo) -> bool:
    return info.dtype in TARGETS and len(info.shape) > 1 and prod(info.shape) > 0


def _likeness(base: Values, info: TensorInfo, grid: _Grid) -> float:
    """Compute the largest median correlation, over both axes and both orientations."""
    rows, columns = info.shape[0], prod(info.shape[1:])
    own = _numbers(base.data(info.name), info.dtype, rows, columns)
    turned = _Grid(rows=grid.columns, columns=grid.rows, at=lambda r, c: grid.at(c, r))
    best = 0.0
    for other in (grid, turned):
        if 0 <= other.rows - rows <= PADDING and 0 <= other.columns - columns <= PADDING:
            for places in _places(rows, columns):
                best = max(best, _correlation(own.at(*places), other.at(*places)))
    return best


def _places(rows: int, columns: int) -> Iterator[tuple[Matrix, Matrix]]:
    """Yield the places of random runs along the rows, then along the columns."""
    random = np.random.default_rng(0)
    for along, across, turned in ((columns, rows, False), (rows, columns, True)):
        if along < SMALLEST:
            continue
        size = min(RUN, along)
        # blocks begin at multiples of their size, so runs do
        starts = random.integers(along // size, size=(RUNS, 1)) * size
        run = starts + np.arange(size)
        line = np.broadcast_to(random.integers(across, size=(RUNS, 1)), run.shape)
        yield (run, line) if turned else (line, run)


def _correlation(ours: npt.NDArray[np.float64], theirs: npt.NDArray[np.float64]) -> float:
    """Compute the median of the runs' absolute correlations; 0 where most runs are constant."""
    with np.errstate(invalid="ignore", over="ignore"):  # masks hold infinity
        ours = ours - ours.mean(axis=1, keepdims=True)
        theirs = theirs - theirs.mean(axis=1, keepdims=True)
        norms = np.sqrt((ours**2).sum(axis=1) * (theirs**2).sum(axis=1))
        products = np.abs((ours * theirs).sum(axis=1))
    usable = np.isfinite(norms) & (norms > 0)
    if usable.sum() < max(SMALLEST, len(norms) // 4):
        return 0.0
    return float(np.median(products[usable] / norms[usable]))


def _grids(folder: Path, tensor: Stored | PackedWeight) -> Iterator[_Grid]:
    """Yield the matrices of numbers that a weight's bytes may stand for."""
    if len(tensor.shape) < 2 or not prod(tensor.shape):
        return
    data = pread(folder / tensor.file, tensor.begin, tensor.nbytes)  # a map dies with its file
    rows, columns = tensor.shape[0], prod(tensor.shape[1:])
    if isinstance(tensor, PackedWeight):
        yield _codes(data, rows, columns, 4, signed=tensor.signed)
    elif tensor.dtype in FLOATS:
        yield _numbers(data, tensor.dtype, rows, columns)
    elif tensor.dtype in ("I8", "U8"):
        yield _codes(data, rows, columns, 8, signed=tensor.dtype == "I8")
        if tensor.dtype == "U8":  # MatMulNBits packs smaller codes into bytes
            yield _codes(data, rows, 2 * columns, 4, signed=False)
            yield _codes(data, rows, 4 * columns, 2, signed=False)


def _numbers(data: Matrix, dtype: str, rows: int, columns: int) -> _Grid:
    kind = FLOATS[dtype]
    held = data.view(kind.storage).reshape(rows, columns)
    return _Grid(
        rows=rows, columns=columns, at=lambda r, c: kind.widen(held[r, c]).astype(np.float64)
    )


def _codes(data: Matrix, rows: int, columns: int, bits: int, *, signed: bool) -> _Grid:
    """Read integers of 2, 4 or 8 bits, the first of a byte in its lowest bits."""
    each, half = 8 // bits, 1 << (bits - 1)

    def at(r: Matrix, c: Matrix) -> npt.NDArray[np.float64]:
        index = r * columns + c
        codes = (data[index // each] >> (index % each * bits).astype(np.uint8)) & ((1 << bits) - 1)
        numbers: npt.NDArray[np.float64] = codes.astype(np.float64)
        if signed:
            numbers[numbers >= half] -= 2 * half
        return numbers

    return _Grid(rows=rows, columns=columns, at=at)
