"""Make of a file for a float model the one for its quantised copy."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kilodelta.errors import InputError, OutputError
from kilodelta.exact.selftest import require_good_kernels
from kilodelta.files.checkpoint import in_name_order
from kilodelta.files.dtypes import FLOATS, TARGETS
from kilodelta.files.identity import raw_digest
from kilodelta.files.tensor import RawTensor
from kilodelta.format.delta import Delta
from kilodelta.format.file import load
from kilodelta.format.grid_names import named_for
from kilodelta.format.manifest import Base
from kilodelta.grid.model import QuantisedModel
from kilodelta.grid.open import open_quantised
from kilodelta.merging.grid_results import GridResult, bound_to, with_results
from kilodelta.progress import Progress, silent
from kilodelta.rehearsal import begin_work, is_dry_run


@dataclass(frozen=True, kw_only=True)
class Rebased:
    """What was written.

    Attributes:
        path: the file.
        nbytes: its size.
        logical_root: of the quantised base.
        kinds: of its codes and blocks, such as `int4 1x32`.
        codes: codes that the merge in the grid could change.
        codes_changed: how many it does.
        steps: the mean size of the update, in steps of the grid.
        others: tensors that are not quantised and are known not to be the float base's, such as
            norms into which a quantiser folded scales; the update may not fit then.
    """

    path: Path
    nbytes: int
    logical_root: str
    kinds: tuple[str, ...]
    codes: int
    codes_changed: int
    steps: float
    others: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        lists = {"kinds": list(self.kinds), "others": list(self.others)}
        return {**vars(self), "path": str(self.path), **lists}


def rebase(
    base: str | os.PathLike[str],
    file: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    name: str | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress = silent,
) -> Rebased:
    """Write a file with the same coefficients for a quantised copy of its base.

    Nothing is trained, and nothing is measured but how many codes its merge changes. Weights are
    found by name, so the copy has to keep the names of the float model; of a GGUF file of the
    llama, qwen2 and qwen3 architectures Hugging Face's names are used.

    Args:
        base: the quantised model: a folder, a `.gguf` or an `.onnx` file.
        file: the `.kd` file for the float model, or for another quantised copy.
        out: the new `.kd` file.
        name: what the base is called, for people; the old one by default.
        force: replace `out`.
        threads: cores to use; all by default.
        progress: receives how far the work is.

    Raises:
        BaseMismatchError: the targets are not those of the quantised model.
        InputError: the file is of a compatibility form, or the model was quantised by AWQ.
        CheckpointError: `base` cannot be read, or is not quantised.
        FileError: the file breaks a rule.
        OutputError: `out` exists or cannot be written.
    """
    place = Path(out)
    if place.exists() and not force:
        raise OutputError(f"{place} exists already", fix="give a new name, or --force")
    delta = load(file)
    model = named_for(open_quantised(base), delta.manifest)
    if is_dry_run():
        bound_to(delta, model, threads=threads, progress=progress)
        begin_work(place, base=model.path, weights=len(model.stored))
    made, found = rebased(delta, model, name=name, threads=threads, progress=progress)
    nbytes, grid = made.save(place), made.manifest.grid
    assert grid is not None  # `rebased` states it
    return Rebased(
        path=place,
        nbytes=nbytes,
        logical_root=grid.logical,
        kinds=grid.kinds,
        codes=found.weights,
        codes_changed=found.changed,
        steps=found.steps,
        others=() if delta.manifest.grid else other_tensors(model, delta.manifest.base),
    )


def rebased(
    delta: Delta,
    model: QuantisedModel,
    *,
    name: str | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> tuple[Delta, GridResult]:
    """Do what `rebase` does, in memory.

    Args:
        delta: of an exact method, bound or not.
        model: the quantised model.
        name: what the base is called; the old name by default.
        threads: cores to use; all by default.
        progress: receives how far the work is.

    Returns:
        the new delta, bound to `model`, and what its merge in the grid changes.

    Raises:
        BaseMismatchError, InputError, CheckpointError: as `rebase`.
    """
    require_good_kernels()
    _require_its_columns(delta, model)
    base = replace(delta.manifest.base, name=delta.manifest.base.name if name is None else name)
    draft = replace(delta, manifest=replace(delta.manifest, base=base))
    return with_results(draft, model, threads=threads, progress=progress)


def other_tensors(model: QuantisedModel, base: Base) -> tuple[str, ...]:
    """Name the tensors of a quantised copy, of those that are not quantised, that its float base
    has otherwise, by the two bytes that a file keeps of each; a copy in another float type counts
    as the same.

    Args:
        model: the quantised copy.
        base: what the file says of the float model; of one with other tensors nothing is known.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    names = in_name_order([*model.stored, *model.plain])
    marks = [base.fingerprints[i : i + 2] for i in range(0, len(base.fingerprints), 2)]
    if [mark[:1] for mark in marks] != [hashlib.sha256(n.encode()).digest()[:1] for n in names]:
        return ()
    plain = set(model.plain)
    return tuple(
        name
        for name, mark in zip(names, marks, strict=True)
        if name in plain and mark[1:] not in _marks(name, model.plain_raw(name))
    )


def _marks(name: str, tensor: RawTensor) -> set[bytes]:
    """Return the first byte of a tensor's digest in each type that its values may be stored in."""
    spelled = [tensor]
    if tensor.dtype in TARGETS:
        values = FLOATS[tensor.dtype].widen(tensor.data)
        spelled += [
            replace(tensor, dtype=dtype, data=FLOATS[dtype].narrow(values).view(np.uint8))
            for dtype in TARGETS
        ]
    return {bytes.fromhex(raw_digest(name, one)[7:9]) for one in spelled}


def _require_its_columns(delta: Delta, model: QuantisedModel) -> None:
    """Refuse AWQ's model of another base: its columns are not those that the update is for.

    Source: Lin et al., arXiv 2306.00978, section 3.2: columns are scaled by what activations are
    like, and the inverse goes into the norm or the layer before.

    Raises:
        InputError: it is one.
    """
    grid = delta.manifest.grid
    if model.method == "awq" and (grid is None or grid.logical != model.identity().root):
        raise InputError(
            f"{model.path} was quantised by AWQ, which scales columns and folds the inverse into"
            " norms and layers before them: an update of the float model fits neither",
            fix="train against this model: kilodelta compress BASE TUNED; or quantise without AWQ",
        )
