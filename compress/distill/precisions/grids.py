"""Quantise a float base as a device would hold it: our own quantiser, every linear layer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np

from kilodelta.compress.distill.job import Job
from kilodelta.compress.distill.precisions.wishes import WAYS
from kilodelta.errors import InputError
from kilodelta.files.dtypes import FLOATS as FLOAT_TYPES
from kilodelta.files.dtypes import TARGETS
from kilodelta.grid.matrix import Matrix
from kilodelta.grid.precisions import PRECISIONS
from kilodelta.grid.quantise import can_quantise, quantised_weight

HALF_LARGEST = float(np.finfo(np.float16).max)
"""The largest float16."""


class Grids:
    """The base's weights on each grid that was asked for, quantised once."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.matrices = cache(self._matrices)

    @property
    def precisions(self) -> tuple[str, ...]:
        """Those of the asked-for precisions of a float base that have codes."""
        return tuple(name for name in self.job.precisions if name in PRECISIONS)

    def _matrices(self, name: str) -> Mapping[str, Matrix]:
        """Return the quantised weights of a precision, or of the quantised base (`in-grid`).

        Of a float base these are all weights of linear layers, targets or not, that can be
        quantised; a target has to be one of them.

        Raises:
            InputError: a target cannot be quantised so; it is named.
            CheckpointError: a weight holds NaN or infinity.
        """
        job = self.job
        if name in WAYS:
            assert job.quantised is not None  # `wishes.settled` has looked
            return {n: job.quantised.matrix(n) for n in job.quantised.stored}
        base, structure = job.pair.base, job.pair.structure
        targets = {target.name for target in job.targets}
        for target in sorted(targets & structure.transposed):
            raise InputError(
                f"{target} cannot be quantised to {name}: its layer has it transposed (a Conv1D)",
                fix="exclude it, or leave the precision out of --for",
            )
        layers = [
            n
            for n in base.names
            if n in structure.layers - structure.transposed and can_quantise(base.info(n), name)
        ]
        return {n: quantised_weight(base, n, name) for n in sorted(targets.union(layers))}

    def check(self) -> None:
        """Check, before the first step, that the model can be had in each precision.

        Raises:
            InputError: it cannot; the message names the tensor.
            CheckpointError: a weight holds NaN or infinity.
        """
        for name in self.precisions:
            self.matrices(name)
        if "fp16" in self.job.precisions:
            self._check_half()

    def _check_half(self) -> None:
        base = self.job.pair.base
        for name in base.names:
            raw = base.raw(name)
            if raw.dtype in TARGETS and raw.data.size:
                largest = float(np.abs(FLOAT_TYPES[raw.dtype].widen(raw.data)).max())
                if not largest <= HALF_LARGEST:
                    raise InputError(
                        f"{name} holds {largest:g}, beyond float16's {HALF_LARGEST:g}",
                        fix="leave fp16 out of --for; bfloat16 and the grids have that range",
                    )
