"""Quantise a float model to nearest, by a text of our own.

Round to nearest with a scale per block; nothing is calibrated. What is written here is the whole
algorithm (docs/format.md, section 10), so every machine and every release makes the same codes; a
library's quantiser may change with its version. All quotients are float64, which decides each
nearest number as exact arithmetic would: weights and steps have 24 significant bits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from kilodelta.errors import CheckpointError, InputError
from kilodelta.files import canonical, plain, safetensors, staging
from kilodelta.files.checkpoint import SINGLE, Checkpoint
from kilodelta.files.dtypes import FLOATS, TARGETS
from kilodelta.files.staging.sidecars import copy_sidecars
from kilodelta.files.tensor import RawTensor, TensorInfo
from kilodelta.grid.bits import pack_bits
from kilodelta.grid.codes import E2M1, E4M3, Kind, e4m3_values, integer_kind
from kilodelta.grid.dequantise import float_folder
from kilodelta.grid.layouts.base import uncentred
from kilodelta.grid.matrix import Floats, Matrix, Shape
from kilodelta.grid.open import is_quantised, open_named
from kilodelta.grid.steps import float_grid

Tensors = dict[str, RawTensor]

FLOAT32 = "float32"
SCALES = (FLOAT32, "float16")
"""Types of scales; a graph that computes in float16 has to have float16 ones."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """One way to quantise: `make` from float64 weights (out, in) to the matrix, `store` to its
    stored tensors by their last names, and the configuration of the folder. Both are told the
    dtype of scales, which NVFP4 leaves alone: its scales are E4M3 numbers."""

    make: Callable[..., Matrix]
    store: Callable[..., Tensors]
    config: Mapping[str, Any]
    group: int
    """Columns that share a scale; a weight's columns have to be a multiple. 1: no condition."""


def nearest_codes(kind: Kind, quotients: Floats) -> npt.NDArray[Any]:
    """Return the codes of the numbers nearest to weights over steps, ties to even, clamped.

    Args:
        kind: what codes are.
        quotients: float64, of any shape; finite.

    Example:
        >>> nearest_codes(E2M1, np.array([0.2, 0.25, -2.5, 99.0])).tolist()
        [0, 0, 12, 7]
    """
    if not kind.is_float:
        return np.asarray(np.clip(np.rint(quotients), kind.low, kind.high).astype(np.int8))
    middles = float_grid(kind).middles
    halves = np.ldexp(np.abs(quotients), 1 - kind.unit)
    low = np.searchsorted(middles, halves, side="left")
    tie = middles[np.minimum(low, middles.size - 1)] == halves
    codes = (low + (tie & (low % 2 == 1))).astype(np.uint8)
    sign = np.uint8(1 << (kind.bits - 1))
    return np.asarray(np.where((quotients < 0) & (codes > 0), codes | sign, codes))


def with_steps(like: Matrix, values: Floats) -> Matrix:
    """Round float weights to a grid that is given: the steps and zero points of `like`.

    Args:
        like: whose grid.
        values: float64 (out, in).
    """
    steps = like.spread(like.steps)
    moved = values if like.minima is None else values - like.spread(like.minima)
    quotients = np.divide(moved, steps, out=np.zeros_like(moved), where=steps != 0)
    zeros = like.zeros
    if zeros is None:
        codes = nearest_codes(like.kind, quotients)
    else:
        rounded = np.rint(quotients) + like.spread(zeros)
        codes = np.clip(rounded, like.kind.low, like.kind.high).astype(np.int8)
    codes = np.where(steps == 0, like.codes, codes)
    return Matrix(kind=like.kind, codes=codes, steps=like.steps, block=like.block, zeros=zeros,
                  minima=like.minima, order=like.order)  # fmt: skip


def _largest(values: Floats, group: int) -> Floats:
    rows, columns = values.shape
    largest: Floats = np.abs(values).reshape(rows, columns // group, group).max(axis=2)
    return largest


def _as_scales(steps: Floats, dtype: str) -> Floats:
    """Round steps to the dtype that they are stored in."""
    with np.errstate(over="ignore"):  # an infinity is refused, by the weight's name
        rounded: Floats = steps.astype(dtype).astype(np.float64)
    return rounded


def _matrix(kind: Kind, values: Floats, steps: Floats, block: Shape) -> Matrix:
    blank = Matrix(kind=kind, codes=np.zeros(values.shape, kind.dtype), steps=steps, block=block)
    return with_steps(blank, values)


def _int4(group: int) -> Precision:
    def make(values: Floats, scales: str = FLOAT32) -> Matrix:
        steps = _as_scales(_largest(values, group) / 7, scales)
        return _matrix(integer_kind(4), values, steps, (1, group))

    def store(matrix: Matrix, scales: str = FLOAT32) -> Tensors:
        rows, columns = matrix.shape
        words = pack_bits(uncentred(matrix.codes, 4), 4, -(-columns // 8) * 4)
        return {
            "weight_packed": RawTensor.of(words.view("<i4")),
            "weight_scale": RawTensor.of(matrix.steps.astype(scales)),
            "weight_shape": RawTensor.of(np.array([rows, columns], np.int64)),
        }

    args = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    return Precision(
        make=make,
        store=store,
        config=_config("pack-quantized", {**args, "group_size": group}),
        group=group,
    )


def _nvfp4() -> Precision:
    def make(values: Floats, scales: str = FLOAT32) -> Matrix:
        top = float(np.abs(values).max(initial=0.0))
        # A power of two, so that ModelOpt's spelling and compressed-tensors' are one model.
        whole = 2.0 ** np.ceil(np.log2(top / (6 * 448))) if top else 1.0
        codes = nearest_codes(E4M3, _largest(values, 16) / 6 / whole)
        steps = e4m3_values(codes) * whole
        return _matrix(E2M1, values, steps, (1, 16))

    def store(matrix: Matrix, scales: str = FLOAT32) -> Tensors:
        largest = float(matrix.steps.max(initial=0.0))
        # Any power of two under which every step is an E4M3 number will do: of the largest one.
        whole = 2.0 ** np.ceil(np.log2(largest / 448)) if largest else 1.0
        steps = nearest_codes(E4M3, matrix.steps / whole)
        if not np.array_equal(e4m3_values(steps) * whole, matrix.steps):
            whole = whole * 2.0
            steps = nearest_codes(E4M3, matrix.steps / whole)
        return {
            "weight_packed": RawTensor.of(pack_bits(matrix.codes, 4, matrix.shape[1] // 2)),
            "weight_scale": RawTensor(dtype="F8_E4M3", shape=steps.shape, data=steps.reshape(-1)),
            "weight_global_scale": RawTensor.of(np.array([1 / whole], np.float32)),
        }

    args = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    config = _config("nvfp4-pack-quantized", {**args, "symmetric": True})
    return Precision(make=make, store=store, config=config, group=16)


def _fp8() -> Precision:
    def make(values: Floats, scales: str = FLOAT32) -> Matrix:
        steps = _as_scales(np.abs(values).max(initial=0.0, keepdims=True) / 448, scales)
        return _matrix(E4M3, values, steps, values.shape)

    def store(matrix: Matrix, scales: str = FLOAT32) -> Tensors:
        codes = matrix.codes.reshape(-1)
        return {
            "weight": RawTensor(dtype="F8_E4M3", shape=matrix.shape, data=codes),
            "weight_scale": RawTensor.of(matrix.steps.reshape(1).astype(scales)),
        }

    args = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}
    return Precision(make=make, store=store, config=_config("float-quantized", args), group=1)


def _config(form: str, weights: dict[str, Any]) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "format": form}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
    }


PRECISIONS: Mapping[str, Precision] = MappingProxyType(
    {
        "int4-g32": _int4(32),
        "int4-g64": _int4(64),
        "int4-g128": _int4(128),
        "nvfp4": _nvfp4(),
        "fp8": _fp8(),
    }
)
"""By name: what `quantise_folder` makes."""


def quantise_folder(
    base: str | os.PathLike[str] | Checkpoint,
    out: str | os.PathLike[str],
    precision: str,
    names: Callable[[str], bool],
    *,
    scales: str = FLOAT32,
) -> int:
    """Write a quantised copy of a model as a compressed-tensors folder.

    The folder holds one safetensors file, the configuration, and what lies beside the base's
    weights (tokenizer, pooling, processor). The weights that are not chosen stay as they are. Of a
    quantised model its values are quantised anew, and those that are not chosen become float32.

    Args:
        base: a float model, a folder or a `.safetensors` file; or a quantised one, a folder or a
            `.gguf` file, whose float32 values lie beside `out` for as long as this runs.
        out: a new folder.
        precision: one of `PRECISIONS`.
        names: says of a weight's name whether it is quantised; those that are chosen have to be
            matrices named `*.weight`.
        scales: "float32" or "float16", the type of scales; NVFP4's are E4M3 whatever is given.

    Returns:
        how many weights are quantised.

    Raises:
        InputError: no such precision or scales, or a chosen weight cannot be quantised so.
        CheckpointError: the base cannot be read, or a chosen weight holds NaN or infinity.
        OutputError: `out` cannot be written.

    Example:
        >>> import tempfile
        >>> base = "tests/golden/0.1.0/base.safetensors"
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     quantise_folder(base, Path(folder) / "q", "fp8", "tall.weight".__eq__)
        1
    """
    if precision not in PRECISIONS:
        raise InputError(
            f"{precision!r} is no precision to quantise to", fix=f"one of {', '.join(PRECISIONS)}"
        )
    if scales not in SCALES:
        raise InputError(f"{scales!r} is no type of scales", fix=f"one of {', '.join(SCALES)}")
    if is_quantised(base):
        with float_folder(open_named(base), beside=Path(out)) as floats:
            return quantise_folder(floats, out, precision, names, scales=scales)
    chosen, checkpoint = PRECISIONS[precision], Checkpoint.open(base)
    tensors: Tensors = {}
    count = 0
    for name in checkpoint.names:
        if not names(name):
            tensors[name] = checkpoint.raw(name)
            continue
        matrix = quantised_weight(checkpoint, name, precision, scales)
        module = name.removesuffix("weight")
        tensors |= {f"{module}{role}": part for role, part in chosen.store(matrix, scales).items()}
        count += 1
    with staging.new_folder(Path(out)) as stage:
        safetensors.write(stage / SINGLE, tensors)
        config = {**_json(checkpoint.folder), "quantization_config": dict(chosen.config)}
        (stage / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if checkpoint.path.is_dir():
            copy_sidecars(checkpoint.folder, stage, frozenset({"config.json"}))
    return count


def can_quantise(info: TensorInfo, precision: str) -> bool:
    """Return whether a tensor can be quantised: a matrix of floats of whole groups, `*.weight`."""
    fits = len(info.shape) == 2 and info.dtype in TARGETS and info.name.endswith(".weight")
    return fits and all(info.shape) and not info.shape[1] % PRECISIONS[precision].group


def quantised_weight(
    checkpoint: Checkpoint, name: str, precision: str, scales: str = FLOAT32
) -> Matrix:
    """Quantise one weight of a float model.

    Args:
        checkpoint: the model.
        name: the weight's.
        precision: one of `PRECISIONS`.
        scales: one of `SCALES`.

    Raises:
        InputError: it cannot be quantised so.
        CheckpointError: it holds NaN or infinity.
    """
    info, chosen = checkpoint.info(name), PRECISIONS[precision]
    if not can_quantise(info, precision):
        raise InputError(
            f"{name} ({info.dtype} {list(info.shape)}) cannot be quantised to {precision}: a matrix"
            f" of floats named *.weight is needed, with a multiple of {chosen.group} columns",
            fix="leave it out, or choose another precision",
        )
    raw = checkpoint.raw(name)
    values = FLOATS[raw.dtype].widen(raw.data).astype(np.float64).reshape(raw.shape)
    if not np.isfinite(values).all():
        raise CheckpointError(f"{name} holds NaN or infinity", fix="repair the base")
    matrix = chosen.make(values, scales)
    if not np.isfinite(matrix.steps).all():
        raise InputError(
            f"{name} needs scales beyond {scales}", fix="leave it out, or take float32 scales"
        )
    return matrix


def _json(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not os.path.lexists(path):
        return {}
    with plain.explained(path, CheckpointError):
        data = plain.read_model_file(path)
    try:
        found = canonical.loads_foreign(data)
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}", fix="repair the base") from None
    return found if isinstance(found, dict) else {}
