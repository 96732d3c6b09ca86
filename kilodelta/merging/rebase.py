"""Make of a file for a float model the one for its quantised copy."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kilodelta.errors import InputError, OutputError
from kilodelta.exact.selftest import require_good_kernels
from kilodelta.format.delta import Delta
from kilodelta.format.file import load
from kilodelta.format.grid_names import named_for
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
    """

    path: Path
    nbytes: int
    logical_root: str
    kinds: tuple[str, ...]
    codes: int
    codes_changed: int
    steps: float

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**vars(self), "path": str(self.path), "kinds": list(self.kinds)}


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
