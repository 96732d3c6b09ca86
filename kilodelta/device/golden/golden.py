"""Golden values: inputs, the outputs they must give, and how far off a precision may be.

A bundle holds them for its base (`base/golden.npz`). A `.kd` file may hold them for its fine-tune
as tensors `probe.*` (docs/format.md, section 2). Both use the same names: `input.<name>`,
`output.<name>` and, in a `.kd`, `limit.<dtype>.<output>`, float32 (relative_l2, relative_max).

A fine-tune of a quantised base computes otherwise in the base's grid than beside it. What it gives
beside the base has the same names behind `beside.`, but for the inputs, which are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kilodelta.errors import DeviceError, FileError, InputError
from kilodelta.files import npz
from kilodelta.files.dtypes import BY_LONG
from kilodelta.files.tensor import RawTensor
from kilodelta.format.delta import Delta
from kilodelta.verify.parity.gate import Limit
from kilodelta.verify.runners.runner import Arrays

FILE = "golden.npz"
TIMES, FREE = 64, 1 << 24
"""What a file's own probe may take to compute, by `size_of`: so many times the bundle's golden
inputs, and in any case as much as 16 rows of 1024 tokens or 32 images of 384 x 384."""
INPUT, OUTPUT, LIMIT = "input.", "output.", "limit."
MERGED, BESIDE = "", "beside."
"""How a fine-tune is applied, as what the names of its golden values begin with."""
_NUMPY = {dtype.name: long for long, dtype in BY_LONG.items() if long in np.sctypeDict}


@dataclass(frozen=True, kw_only=True)
class Golden:
    """Inputs by name, and the outputs they must give: float32, computed in float64."""

    inputs: Arrays
    outputs: Arrays


def write(path: Path, golden: Golden) -> None:
    """Write a bundle's golden values.

    Raises:
        OutputError: they cannot be written.
    """
    npz.write_npz(path, _flat(golden))


def read(path: Path) -> Golden:
    """Read a bundle's golden values.

    Raises:
        DeviceError: they are missing or damaged.
    """
    try:
        return _golden(npz.read_modest(path))
    except InputError as problem:
        raise DeviceError(problem.what, fix="copy the bundle to the device again") from None


def way_of(delta: Delta, mode: str) -> str:
    """Return how a device folder applies a fine-tune: `BESIDE` a quantised base, or `MERGED`.

    Args:
        delta: the fine-tune.
        mode: the folder's: adapter mode leaves codes alone.
    """
    return BESIDE if delta.manifest.grid is not None and mode == "adapter" else MERGED


def to_probes(
    golden: Golden, limits: Mapping[str, Mapping[str, Limit]], way: str = MERGED
) -> dict[str, RawTensor]:
    """Return the tensors that a `.kd` file carries.

    Args:
        golden: inputs and outputs of the fine-tune.
        limits: by precision, then by output.
        way: how it was applied, `MERGED` or `BESIDE`.
    """
    arrays = {INPUT + name: array for name, array in golden.inputs.items()}
    arrays |= {way + OUTPUT + name: array for name, array in golden.outputs.items()}
    for dtype, outputs in limits.items():
        for name, limit in outputs.items():
            pair = np.array([limit.relative_l2, limit.relative_max], np.float32)
            arrays[f"{way}{LIMIT}{dtype}.{name}"] = pair
    return {name: RawTensor.copy_of(array) for name, array in arrays.items()}


def of_delta(delta: Delta, way: str = MERGED) -> Golden | None:
    """Return a file's own golden values, or None.

    Args:
        delta: the file.
        way: how it is applied; values of the other way alone are none.

    Raises:
        FileError: its probe is damaged or of another kind.
    """
    if not delta.probes:
        return None
    golden = _golden({name: _array(name, tensor) for name, tensor in delta.probes.items()}, way)
    if not golden.outputs and any(name.startswith(BESIDE) for name in delta.probes):
        return None
    if not golden.inputs or not golden.outputs:
        raise _unfit("the file's probe has no inputs, or no outputs")
    return golden


def size_of(inputs: Arrays) -> int:
    """Say roughly how much inputs ask of a model: their elements; integers, which may be tokens
    that attend to each other, count as often as their longest row is long.

    Example:
        >>> size_of({"input_ids": np.zeros((2, 128), np.int64)})
        32768
    """
    return sum(
        array.size * (max(array.shape[1:], default=1) if array.dtype.kind in "biu" else 1)
        for array in inputs.values()
    )


def limits_of(delta: Delta, dtype: str, way: str = MERGED) -> dict[str, Limit]:
    """Return a file's limits by output in one precision; empty where it states none.

    Raises:
        FileError: one is no pair of numbers.
    """
    prefix = f"{way}{LIMIT}{dtype}."
    return {
        name.removeprefix(prefix): _limit(name, _array(name, tensor))
        for name, tensor in delta.probes.items()
        if name.startswith(prefix)
    }


def _flat(golden: Golden) -> dict[str, NDArray[Any]]:
    inputs = {INPUT + name: array for name, array in golden.inputs.items()}
    return inputs | {OUTPUT + name: array for name, array in golden.outputs.items()}


def _golden(arrays: Mapping[str, NDArray[Any]], way: str = MERGED) -> Golden:
    return Golden(inputs=_named(arrays, INPUT), outputs=_named(arrays, way + OUTPUT))


def _named(arrays: Mapping[str, NDArray[Any]], prefix: str) -> Arrays:
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}


def _array(name: str, tensor: RawTensor) -> NDArray[Any]:
    if tensor.dtype not in _NUMPY:
        raise _unfit(f"probe {name!r:.80} is {tensor.dtype}, which numpy lacks")
    return tensor.data.view(_NUMPY[tensor.dtype]).reshape(tensor.shape)


def _limit(name: str, pair: NDArray[Any]) -> Limit:
    if pair.dtype != np.float32 or pair.shape != (2,) or not np.all(pair >= 0):
        raise _unfit(f"probe {name!r:.80} is not two float32 numbers from 0 on")
    return Limit(relative_l2=float(pair[0]), relative_max=float(pair[1]))


def _unfit(what: str) -> FileError:
    return FileError(what, fix="make the probe with kilodelta release")
