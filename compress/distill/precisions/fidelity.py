"""Measure a finished delta in each precision: merged exactly, as a device would hold it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kilodelta.compress.distill.job import Job
from kilodelta.compress.distill.learn.data import Data
from kilodelta.compress.distill.learn.measure import measure
from kilodelta.compress.distill.learn.objective import Measures
from kilodelta.compress.distill.merged import fill_merged
from kilodelta.compress.distill.precisions.grids import Grids
from kilodelta.compress.distill.precisions.wishes import BESIDE, IN_GRID, WAYS, beside
from kilodelta.files.tensor import RawTensor
from kilodelta.format.delta import Delta
from kilodelta.grid.matrix import Matrix
from kilodelta.grid.precisions import PRECISIONS
from kilodelta.merging.in_grid import MIN_CHANGED, regridded
from kilodelta.models import LoadedModel
from kilodelta.models.weights import values


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """What a file keeps in one precision, on the held-out inputs.

    Attributes:
        name: `in-grid` or `beside` of a quantised base; of a float one a precision (of codes:
            merged in the grid), or `<precision>.beside`.
        agreement, divergence: against the tuned model, over all outputs.
        codes_changed: the share of the targets' codes that a merge in the grid changes; None where
            there is none.
        outputs: the measures per output.
    """

    name: str
    agreement: float
    divergence: float
    codes_changed: float | None
    outputs: tuple[Measures, ...]


@torch.no_grad()
def measure_each(
    job: Job, grids: Grids, delta: Delta, student: LoadedModel, data: Data
) -> tuple[Fidelity, ...]:
    """Measure a delta in each asked-for precision.

    Args:
        job: what was asked for.
        grids: the base's weights on each grid.
        delta: bound to the base that the file states.
        student: its module is the base's, nothing attached; it is filled anew each time, and holds
            the last of it afterwards.
        data: the held-out inputs and the teacher's outputs.
    """
    if not job.precisions:
        return ()
    filled = _Filled(job, grids, delta, student)
    found = []

    def add(name: str, share: float | None = None) -> None:
        outputs = measure(student, data, data.held_out)
        overall = data.objective.overall(outputs)
        found.append(
            Fidelity(
                name=name,
                agreement=overall.agreement,
                divergence=overall.divergence,
                codes_changed=share,
                outputs=outputs,
            )
        )

    for name in job.precisions:
        if name in PRECISIONS or name == IN_GRID:
            add(name, filled.in_grid(name))
        if name in PRECISIONS or name == BESIDE:
            filled.beside(name)
            add(beside(name) if name in PRECISIONS else name)
        if name in ("fp32", "fp16"):
            filled.floats(half=name == "fp16")
            add(name)
    return tuple(found)


class _Filled:
    """The student's module, with the delta's merged weights in it."""

    def __init__(self, job: Job, grids: Grids, delta: Delta, student: LoadedModel) -> None:
        self.job, self.grids, self.delta = job, grids, delta
        self.state: dict[str, Tensor] = student.module.state_dict()
        self.module = student.module
        changing = self._changing()
        self._before = {name: self.state[name].clone() for name in changing if name in self.state}

    def _changing(self) -> set[str]:
        """Name the tensors that any precision changes: of a large model as few as possible."""
        if "fp16" in self.job.precisions:
            return set(self.state)
        weights = {*self.delta.tensors, *self.delta.extras}
        for name in self.job.precisions:
            if name in PRECISIONS or name in WAYS:
                weights.update(self.grids.matrices(name))
        return {self.job.pair.names.get(weight, "") for weight in weights}

    def in_grid(self, name: str) -> float:
        """Merge in the grid; return the share of the targets' codes that change."""
        matrices = self._reset(name)
        changed = codes = 0
        for weight, matrix in matrices.items():
            if weight in self.delta.targets:
                new = regridded(self.delta, self.delta.targets[weight], matrix)
                changed, codes = changed + new.changed, codes + matrix.codes.size
                matrix = new.matrix
            self._put(weight, matrix.values())
        return changed / codes if codes else 1.0

    def beside(self, name: str) -> None:
        """Put the exact update beside the quantised base's values."""
        for weight, matrix in self._reset(name).items():
            total = matrix.values()
            if weight in self.delta.targets:
                total = total + self.delta.update(weight).astype(np.float64)
            self._put(weight, total)

    def floats(self, *, half: bool) -> None:
        """Merge as floats, each rounded to float16 if `half`."""
        self._reset(None)
        if half:
            for tensor in self.state.values():
                if tensor.is_floating_point():
                    tensor.copy_(tensor.half())

    def _reset(self, name: str | None) -> Mapping[str, Matrix]:
        """Undo all that was filled in; merge extras, and those targets that are on no grid."""
        for state, tensor in self._before.items():
            self.state[state].copy_(tensor)
        matrices = {} if name is None else self.grids.matrices(name)
        plain = [n for n in self.delta.tensors if n not in matrices]
        fill_merged(self.module, self.delta, self.job.pair.base, self.job.pair.names, plain)
        return matrices

    def _put(self, weight: str, floats: np.ndarray[Any, Any]) -> None:
        if weight in self.job.pair.names:
            raw = RawTensor.of(floats.astype(np.float32))
            self.state[self.job.pair.names[weight]].copy_(values(raw))


def made_of(fidelities: Sequence[Fidelity]) -> dict[str, float]:
    """Write what the manifest says about precisions (docs/format.md, section 3)."""
    made = {}
    for one in fidelities:
        made[f"agreement.{one.name}"] = round(one.agreement, 4)
        if one.codes_changed is not None and one.name not in WAYS:
            made[f"codes_changed.{one.name}"] = round(one.codes_changed, 6)
    return made


def few_codes(made: Mapping[str, Any], fidelities: Sequence[Fidelity]) -> list[str]:
    """Warn of each grid in which a merge changes so few codes that `merge` refuses it.

    A handful of codes may still be all that a task needs, so the warning says what was measured.

    Args:
        made: what the file says of itself; of a quantised base, `grid_codes_changed` as well.
        fidelities: what was measured.

    Example:
        >>> one = Fidelity(
        ...     name="in-grid", agreement=0.825, divergence=0.2, codes_changed=0.004, outputs=()
        ... )
        >>> few_codes({}, [one])[0].partition(";")[0]
        'merged in the grid (in-grid), 0.40% of the codes change, and the result agrees by 0.825'
    """
    shares = {f.name: f.codes_changed for f in fidelities if f.codes_changed is not None}
    agreements = {f.name: f", and the result agrees by {f.agreement:.3g}" for f in fidelities}
    if "grid_codes_changed" in made:  # also where a merge in the grid was not asked for
        shares[IN_GRID] = made["grid_codes_changed"]
    return [
        f"merged in the grid ({name}), {share:.2%} of the codes change{agreements.get(name, '')};"
        f" `merge` refuses less than {MIN_CHANGED:.0%} without --min-changed: apply the file beside"
        " it, or give more --steps or a larger --budget"
        for name, share in shares.items()
        if share < MIN_CHANGED
    ]
