"""Compare two models, or two deltas of one base, tensor by tensor and in little memory."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kilodelta.errors import InputError
from kilodelta.files.checkpoint import Checkpoint, in_name_order
from kilodelta.files.dtypes import FLOATS
from kilodelta.format.delta import Delta
from kilodelta.format.file import load
from kilodelta.progress import Meter, Progress, silent

SAME, CHANGED, ONLY_FIRST, ONLY_SECOND, OTHER_SHAPE, OTHER_TYPE = (
    "same",
    "changed",
    "only in the first",
    "only in the second",
    "another shape",
    "same values in another type",
)
_BLOCK = 1 << 20
"""Elements that are held as float64 at a time: 8 MB for each of two tensors."""


@dataclass(frozen=True, kw_only=True)
class TensorRow:
    """One tensor: what happened to it, and by how much where both have numbers of one shape.

    Attributes:
        name: the tensor.
        change: one of this module's constants.
        relative: norm of the difference over the norm of the first; infinite over zeros, NaN where
            only one of the two is NaN; None where there is nothing to subtract.
        largest: largest absolute difference of an element.
        share: of the squared difference of all changed tensors, 0 to 1.
        kinds: dtype and shape in the first and in the second; empty where it is missing.
    """

    name: str
    change: str
    relative: float | None = None
    largest: float | None = None
    share: float | None = None
    kinds: tuple[str, str] = ("", "")

    def to_json(self) -> dict[str, Any]:
        """Return strict JSON values: what is not finite becomes text."""
        return {k: _strict(v) for k, v in vars(self).items()} | {"kinds": list(self.kinds)}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Two models or deltas side by side.

    Attributes:
        kind: what was compared.
        facts: manifest fields of deltas that differ, by name, with both values; empty for models.
        rows: one for each tensor in which they differ, the largest share first.
        same: how many tensors are equal.
    """

    kind: Literal["models", "deltas"]
    facts: dict[str, tuple[Any, Any]]
    rows: tuple[TensorRow, ...]
    same: int

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.rows and not self.facts

    def to_json(self) -> dict[str, Any]:
        """Return strict JSON values."""
        return {
            "kind": self.kind,
            "equal": self.equal,
            "same": self.same,
            "facts": {name: list(both) for name, both in self.facts.items()},
            "rows": [row.to_json() for row in self.rows],
        }


def diff(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
) -> Difference:
    """Say in which tensors two models, or two deltas, differ and by how much.

    Models are compared value by value across float types: a bfloat16 base and a float32 copy of
    it are the same values in another type. Deltas are compared by their manifests and, with
    `base`, by the updates that they make.

    Args:
        first: a model (`.safetensors` or folder), or a `.kd` file.
        second: the same kind of thing.
        base: the base of both deltas, to compare updates; not for models.
        progress: called with what is compared.

    Raises:
        InputError: a model beside a delta, or `base` beside models.
        CheckpointError: a model cannot be read.
        FileError: a `.kd` file is damaged.
        BaseMismatchError: `base` does not fit one of the deltas.

    Example:
        >>> from kilodelta.merging.diff import diff
        >>> golden = "tests/golden/0.1.0"
        >>> both = diff(f"{golden}/lora-4.kd", f"{golden}/lora-8.kd")
        >>> both.facts["bits"]
        (4, 8)
    """
    deltas = [Path(path).suffix == ".kd" for path in (first, second)]
    if deltas[0] != deltas[1]:
        Checkpoint.open(Path(first if deltas[1] else second))  # says if that is no model at all
        raise InputError(
            f"{os.fspath(first)} and {os.fspath(second)} are a model and a delta",
            fix="merge the delta first, or give two models, or two .kd files",
        )
    if not deltas[0]:
        if base is not None:
            raise InputError("--base is for comparing .kd files", fix="leave it out")
        return _models(Checkpoint.open(Path(first)), Checkpoint.open(Path(second)), progress)
    return _deltas(load(first), load(second), base, progress)


def _models(first: Checkpoint, second: Checkpoint, progress: Progress) -> Difference:
    names = in_name_order({*first.names, *second.names})
    total = sum(first.info(n).nbytes for n in first.names)
    meter = Meter("compare", total, "bytes", progress)
    rows, energies, same = [], {}, 0
    for name in names:
        row, energy = _model_row(name, first, second)
        if name in first:
            meter.add(first.info(name).nbytes)
        if row.change == SAME:
            same += 1
            continue
        rows.append(row)
        energies[name] = energy
    return Difference(kind="models", facts={}, rows=_shared(rows, energies), same=same)


def _model_row(name: str, first: Checkpoint, second: Checkpoint) -> tuple[TensorRow, float]:
    """Compare one tensor: its row, and its squared difference."""
    if name not in second:
        return TensorRow(name=name, change=ONLY_FIRST, kinds=(_kind(first, name), "")), 0.0
    if name not in first:
        return TensorRow(name=name, change=ONLY_SECOND, kinds=("", _kind(second, name))), 0.0
    kinds = _kind(first, name), _kind(second, name)
    a, b = first.info(name), second.info(name)
    if a.shape != b.shape:
        return TensorRow(name=name, change=OTHER_SHAPE, kinds=kinds), 0.0
    # By bytes, so that NaN equals itself and tensors that are no floats can be compared.
    if a.dtype == b.dtype and np.array_equal(first.data(name), second.data(name)):
        return TensorRow(name=name, change=SAME), 0.0
    if a.dtype not in FLOATS or b.dtype not in FLOATS:
        return TensorRow(name=name, change=CHANGED, kinds=kinds), 0.0
    pairs = zip(_values(first, name), _values(second, name), strict=True)
    relative, largest, energy = _measure(pairs)
    change = OTHER_TYPE if largest == 0 else CHANGED
    row = TensorRow(name=name, change=change, relative=relative, largest=largest, kinds=kinds)
    return row, energy


def _kind(model: Checkpoint, name: str) -> str:
    info = model.info(name)
    return f"{info.dtype} {list(info.shape)}"


def _values(model: Checkpoint, name: str) -> Iterator[npt.NDArray[np.float64]]:
    """Yield a float tensor's values by blocks, as float64 (but for F64 by way of float32)."""
    dtype = FLOATS[model.info(name).dtype]
    data = model.tensor(name)
    step = _BLOCK * dtype.bits // 8
    for start in range(0, data.size, step):
        block = data[start : start + step]
        if dtype.name == "F64":
            yield block.view("<f8").astype(np.float64)
        else:
            yield dtype.widen(block).astype(np.float64)


def _measure(pairs: Any) -> tuple[float, float, float]:
    """Relative norm, largest element and squared norm of the difference over blocks of pairs."""
    energy = norm = largest = 0.0
    for a, b in pairs:
        # inf - inf is NaN by design here: such a difference has no size. NaN in both is no change.
        with np.errstate(invalid="ignore", over="ignore"):
            equal = (a == b) | (np.isnan(a) & np.isnan(b))
            change = np.where(equal, 0.0, b - a)
            size = np.nan_to_num(a, nan=0.0, posinf=np.inf, neginf=-np.inf)
            energy += float(change @ change)
            norm += float(size @ size)
            largest = max(largest, float(np.max(np.abs(change), initial=0.0)), key=_nan_last)
    if energy == 0.0:
        return 0.0, largest, 0.0
    return math.sqrt(energy / norm) if norm else math.inf, largest, energy


def _nan_last(value: float) -> float:
    """Order NaN above all numbers, so that it is what a maximum keeps."""
    return math.inf if math.isnan(value) else value


def _shared(rows: list[TensorRow], energies: dict[str, float]) -> tuple[TensorRow, ...]:
    """Rows with their share of the whole squared difference, the largest first."""
    whole = sum(e for e in energies.values() if math.isfinite(e))
    out = []
    for row in rows:
        energy = energies[row.name]
        is_sized = row.relative is not None and math.isfinite(energy) and whole > 0
        out.append(TensorRow(**{**vars(row), "share": energy / whole if is_sized else None}))
    return tuple(sorted(out, key=lambda r: -(r.share or 0.0)))


def _deltas(
    first: Delta, second: Delta, base: str | os.PathLike[str] | None, progress: Progress
) -> Difference:
    ours, theirs = _facts(first), _facts(second)
    facts = {name: (a, theirs[name]) for name, a in ours.items() if a != theirs[name]}
    if base is None:
        return Difference(kind="deltas", facts=facts, rows=(), same=0)
    checkpoint = Checkpoint.open(Path(base))
    one, two = first.bind(checkpoint), second.bind(checkpoint)
    names = in_name_order({*one.targets, *two.targets})
    meter = Meter("compare", len(names), "tensors", progress)
    rows, energies, same = [], {}, 0
    for name in names:
        row, energy = _update_row(name, one, two)
        meter.add(1)
        if row.change == SAME:
            same += 1
            continue
        rows.append(row)
        energies[name] = energy
    return Difference(kind="deltas", facts=facts, rows=_shared(rows, energies), same=same)


def _update_row(name: str, one: Delta, two: Delta) -> tuple[TensorRow, float]:
    if name not in two.targets:
        return TensorRow(name=name, change=ONLY_FIRST), 0.0
    if name not in one.targets:
        return TensorRow(name=name, change=ONLY_SECOND), 0.0
    a, b = one.update(name), two.update(name)
    if np.array_equal(a, b):
        return TensorRow(name=name, change=SAME), 0.0
    blocks = (
        (x.astype(np.float64), y.astype(np.float64))
        for x, y in zip(_blocks(a), _blocks(b), strict=True)
    )
    relative, largest, energy = _measure(blocks)
    return TensorRow(name=name, change=CHANGED, relative=relative, largest=largest), energy


def _blocks(values: npt.NDArray[np.float32]) -> Iterator[npt.NDArray[np.float32]]:
    flat = values.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        yield flat[start : start + _BLOCK]


def _facts(delta: Delta) -> dict[str, Any]:
    """List what two deltas are compared by without a base."""
    manifest = delta.manifest
    return {
        "base": manifest.base.root,
        "method": dict(manifest.method.to_manifest()),
        "bits": manifest.bits,
        "seed": str(manifest.seed),
        "targets": manifest.count,
        "include": list(manifest.patterns.include),
        "exclude": list(manifest.patterns.exclude),
        "extras": {n: f"{t.dtype} {list(t.shape)}" for n, t in delta.extras.items()},
        "config": dict(manifest.config),
        "made": dict(manifest.made),
        "result": manifest.result,
    }


def _strict(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
