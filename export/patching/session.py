"""Serve a delta with the base's ONNX file in ONNX Runtime, and write no file.

Weights in external data are handed over as `add_external_initializers`; it refuses others. Those
are patched in the model's bytes. (`add_initializer` would take both, but under the default
optimisations some of the old weights may have been folded by then, and nothing says so.)
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kilodelta.errors import ExportError, require
from kilodelta.exact.selftest import require_good_kernels
from kilodelta.export.merge.tensor import changed_names
from kilodelta.export.patching.map import FilePlace, PatchMap
from kilodelta.export.patching.plan import Bytes, PatchPlan, make_plan
from kilodelta.export.patching.run import run
from kilodelta.export.patching.strided import put_place
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.dtypes import DTYPES
from kilodelta.format.delta import Delta
from kilodelta.format.file import load
from kilodelta.merging.quantised import MIN_CHANGED
from kilodelta.progress import Progress, silent


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What a session needs: the model, patched where weights lie in its own bytes, and the rest.

    `initializers` holds, by name, the safetensors dtype and the array (bfloat16 as uint16).
    """

    model: Path | bytes
    folder: Path
    initializers: Mapping[str, tuple[str, npt.NDArray[Any]]]


def patched_weights(
    model: str | os.PathLike[str],
    delta: str | os.PathLike[str] | Delta,
    *,
    places: PatchMap,
    base: str | Path | Checkpoint | None = None,
    min_changed: float = MIN_CHANGED,
    threads: int | None = None,
    progress: Progress = silent,
) -> Weights:
    """Compute the tuned weights in memory, and prove them.

    Args:
        model: the base's ONNX file.
        delta: a `.kd` file or a `Delta`.
        places: the map of `model`.
        base: the base checkpoint, or `write_rest`'s part of it, for what the file does not hold.
        min_changed: the share of a quantised base's codes that has to change.
        threads: cores to use; all by default.
        progress: called with how far the work is, in bytes.

    Raises:
        BaseMismatchError: `model` holds another base than the delta's.
        CheckpointError: `model` is not the file that the map was made for.
        ExportError: a weight lies in external data, but inside a subgraph or constant; or a changed
            tensor was fused, merged or folded, or `base` is needed.
        ProofError: the result's digest is not the file's.
        QualityError: fewer codes of a quantised base change than `min_changed`.
    """
    require_good_kernels()
    opened = delta if isinstance(delta, Delta) else load(delta)
    plan = make_plan(Path(model), opened, places, base)
    inline: list[tuple[FilePlace, Bytes]] = []
    initializers: dict[str, tuple[str, npt.NDArray[Any]]] = {}
    _require_reachable(plan)

    def write(place: FilePlace, data: Bytes) -> None:
        if place.file == places.files[0].file:
            inline.append((place, data))
        else:
            array = data.view(DTYPES[place.dtype].storage).reshape(place.shape)
            initializers[place.name] = place.dtype, array

    run(plan, write, min_changed=min_changed, threads=threads, progress=progress)
    return Weights(
        model=_patched(plan.model, inline) if inline else plan.model,
        folder=plan.model.parent,
        initializers=initializers,
    )


def _require_reachable(plan: PatchPlan) -> None:
    for name in changed_names(plan.delta):
        for place in plan.places(name):
            if place.file != plan.patch_map.files[0].file and (place.stride or not place.top):
                why = (
                    "in a type that a session takes from no array"
                    if name in plan.patch_map.codes
                    else "but not among the main graph's initializers"
                )
                raise ExportError(f"{name} lies in external data, {why}", fix="patch into a file")


def _patched(model: Path, inline: list[tuple[FilePlace, Bytes]]) -> bytes:
    """Return the file's bytes with some replaced."""
    data = np.fromfile(model, np.uint8)
    for place, new in inline:
        put_place(data, place, new)
    return data.tobytes()


def open_patched(
    model: str | os.PathLike[str],
    delta: str | os.PathLike[str] | Delta,
    *,
    places: PatchMap,
    base: str | Path | Checkpoint | None = None,
    min_changed: float = MIN_CHANGED,
    options: Any = None,
    providers: Sequence[Any] = ("CPUExecutionProvider",),
    threads: int | None = None,
    progress: Progress = silent,
) -> Any:
    """Open an `onnxruntime.InferenceSession` of the fine-tune.

    Args:
        model: the base's ONNX file.
        delta: a `.kd` file or a `Delta`.
        places: the map of `model`.
        base: the base checkpoint, or `write_rest`'s part of it, for what the file does not hold.
        min_changed: the share of a quantised base's codes that has to change.
        options: `onnxruntime.SessionOptions` for this session alone.
        providers: execution providers, in order of preference.
        threads: cores to compute the weights with; all by default.
        progress: called with how far the work is, in bytes.

    Raises:
        MissingPackageError: ONNX Runtime is not installed.
        KiloDeltaError: what `patched_weights` raises.
    """
    ort = require("onnxruntime", extra="cpu", why="run ONNX models")
    weights = patched_weights(
        model,
        delta,
        places=places,
        base=base,
        min_changed=min_changed,
        threads=threads,
        progress=progress,
    )
    options = options or ort.SessionOptions()
    held = {name: _value(ort, *weight) for name, weight in weights.initializers.items()}
    if held:
        options.add_external_initializers(list(held), list(held.values()))
    if isinstance(weights.model, bytes):
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(weights.folder)
        )
    source = weights.model if isinstance(weights.model, bytes) else str(weights.model)
    session = ort.InferenceSession(source, options, providers=list(providers))
    weakref.finalize(session, held.clear)  # the session uses this memory as long as it lives
    return session


def _value(ort: Any, dtype: str, array: npt.NDArray[Any]) -> Any:
    if dtype == "BF16":  # numpy lacks it
        number = DTYPES["BF16"].onnx_number
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, number)
    return ort.OrtValue.ortvalue_from_numpy(array)
