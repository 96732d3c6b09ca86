"""Quantise a float model's weights to nearest (`precisions.py`): one weight, or a whole folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from kilodelta.errors import CheckpointError, InputError
from kilodelta.files import canonical, plain, safetensors, staging
from kilodelta.files.checkpoint import SINGLE, Checkpoint
from kilodelta.files.dtypes import FLOATS, TARGETS
from kilodelta.files.staging.sidecars import copy_sidecars
from kilodelta.files.tensor import TensorInfo
from kilodelta.grid.dequantise import float_bytes, float_folder
from kilodelta.grid.matrix import Matrix
from kilodelta.grid.model import QuantisedModel
from kilodelta.grid.open import is_quantised, open_named
from kilodelta.grid.precisions import FLOAT32, PRECISIONS, SCALES, Tensors


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
        OutputError: `out` is there already, cannot be written, or its disk has less room than
            the copy takes; that is said before any weight is read.

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
    place = Path(out)
    staging.require_free(place)
    if is_quantised(base):
        model = open_named(base)
        staging.require_room(*needs_of_copy(model, place, precision, names, scales))
        with float_folder(model, beside=place) as floats:
            return quantise_folder(floats, place, precision, names, scales=scales)
    chosen, checkpoint = PRECISIONS[precision], Checkpoint.open(base)
    staging.require_room(*needs_of_copy(checkpoint, place, precision, names, scales))
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
    with staging.new_folder(place) as stage:
        safetensors.write(stage / SINGLE, tensors)
        config = {**_json(checkpoint.folder), "quantization_config": dict(chosen.config)}
        (stage / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if checkpoint.path.is_dir():
            copy_sidecars(checkpoint.folder, stage, frozenset({"config.json"}))
    return count


def needs_of_copy(
    base: Checkpoint | QuantisedModel,
    out: Path,
    precision: str,
    names: Callable[[str], bool],
    scales: str = FLOAT32,
) -> list[staging.Need]:
    """List what `quantise_folder` puts beside and into its folder: the weights, and of a quantised
    base its float32 values.

    Args:
        base: the model.
        out: the new folder.
        precision, names, scales: as of `quantise_folder`.
    """
    sizes: dict[str, tuple[tuple[int, ...], int]] = {}
    needs: list[staging.Need] = []
    if isinstance(base, QuantisedModel):
        sizes = {name: (one.shape, 4 * prod(one.shape)) for name, one in base.stored.items()}
        infos = [base.plain_info(name) for name in base.plain]
        values = "the values of the quantised base as floats"
        needs = [staging.Need(path=out, nbytes=float_bytes(base), what=values)]
    else:
        infos = [base.info(name) for name in base.names]
    sizes |= {info.name: (info.shape, info.nbytes) for info in infos}
    nbytes = sum(
        PRECISIONS[precision].nbytes(shape, scales) if names(name) else size
        for name, (shape, size) in sizes.items()
    )
    return [*needs, staging.Need(path=out, nbytes=nbytes, what=f"the copy in {precision}")]


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
