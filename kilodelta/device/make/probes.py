"""Make the probe of a release: golden outputs of the fine-tune, and what each precision may lose.

A fine-tune of a quantised base computes otherwise in the base's grid than beside the base, so its
release states both, and every device is held to the one that its mode applies.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TypeAlias

from kilodelta.device.golden import golden, reference
from kilodelta.errors import QualityError
from kilodelta.export.architecture import open_headed
from kilodelta.export.manifest.facts import DTYPES
from kilodelta.export.merged_model import beside_weights, merged_weights, open_merged
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.tensor import RawTensor
from kilodelta.format.delta import Delta
from kilodelta.grid.dequantise import float_folder
from kilodelta.grid.model import QuantisedModel
from kilodelta.grid.open import open_named
from kilodelta.merging.quantised import open_base, require_grid_base
from kilodelta.models import LoadedModel, locate
from kilodelta.progress import Progress

Architecture: TypeAlias = tuple[str | None, str | None, tuple[str, ...]]
"""A builder, a configuration, and the outputs that count, as `release` is given them."""
Probes: TypeAlias = Mapping[str, RawTensor]


class ProbeJob:
    """One probe in the making.

    Args:
        base: the model that the file was made for.
        delta: the file.
        inputs: of the task.
        rows: how many of them the probe has.
        architecture: of the fine-tune.
        out: a path beside which the merged weights lie for as long as they are needed.
        progress: called while the weights are merged.
    """

    def __init__(
        self,
        base: str | os.PathLike[str],
        delta: Delta,
        inputs: str,
        rows: int,
        architecture: Architecture,
        out: Path,
        progress: Progress,
    ) -> None:
        self._base, self._delta = locate(os.fspath(base)), delta
        self._inputs, self._rows = inputs, rows
        self._model, self._config, self._outputs = architecture
        self._out, self._progress = out, progress

    def run(self) -> tuple[Probes, tuple[str, ...]]:
        """Return the probe's tensors, and the precisions in which it tells the two models apart.

        Raises:
            InputError: the inputs do not tell the fine-tune from its base.
            BaseMismatchError: the base is another model.
        """
        with ExitStack() as stack:
            if self._delta.manifest.grid is not None:
                return self._of_both_ways(open_base(self._base, self._delta.manifest), stack)
            checkpoint = Checkpoint.open(self._base)
            weights = stack.enter_context(
                merged_weights(checkpoint, self._delta, beside=self._out, progress=self._progress)
            )
            tuned = self._opened(checkpoint, weights)
            return self._told(tuned, self._plain(checkpoint), golden.MERGED)

    def _of_both_ways(
        self, base: QuantisedModel, stack: ExitStack
    ) -> tuple[Probes, tuple[str, ...]]:
        """Probe a fine-tune of a quantised base beside it and, where it survives, in its grid."""
        require_grid_base(base, self._delta.manifest, progress=self._progress)
        floats = stack.enter_context(float_folder(base, beside=self._out))
        plain = self._plain(Checkpoint.open(floats))
        bound = self._delta.bind(base)
        beside = stack.enter_context(beside_weights(base, bound, beside=self._out))
        tuned = self._opened(Checkpoint.open(floats), beside)
        probes, dtypes = self._told(tuned, plain, golden.BESIDE)
        try:
            files = base.source if isinstance(base.source, Checkpoint) else base.path
            weights = stack.enter_context(
                merged_weights(files, self._delta, beside=self._out, progress=self._progress)
            )
        except QualityError:  # such a file is for devices that apply it beside the base
            return probes, dtypes
        merged = stack.enter_context(float_folder(open_named(weights), beside=self._out))
        tuned = self._opened(Checkpoint.open(merged), merged)
        in_grid, both = self._told(tuned, plain, golden.MERGED)
        return {**probes, **in_grid}, tuple(dtype for dtype in dtypes if dtype in both)

    def _opened(self, base: Checkpoint, weights: Path) -> LoadedModel:
        return open_merged(
            base,
            weights,
            self._delta,
            model=self._model,
            config=self._config,
            outputs=self._outputs,
            source=self._base,
        )

    def _plain(self, base: Checkpoint) -> LoadedModel:
        return open_headed(base, config=self._config, delta=self._delta, model=self._model).loaded

    def _told(
        self, tuned: LoadedModel, plain: LoadedModel, way: str
    ) -> tuple[Probes, tuple[str, ...]]:
        """Compute golden outputs, and the precisions that tell the fine-tune from its base."""
        exact = reference.exact(tuned, reference.golden_inputs(tuned, self._inputs, self._rows))
        limits = reference.telling_limits(tuned, plain, exact, DTYPES)
        return golden.to_probes(exact, limits, way), tuple(limits)
