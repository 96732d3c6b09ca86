"""Choose the method given by hand, or the one that the budget buys.

A budget is one of the whole file. So the bytes beside the coefficients are counted by writing a
header that is as long as any that can come of the job.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kilodelta import __version__
from kilodelta.compress.distill import budget as budgets
from kilodelta.compress.distill.changes.split import Split
from kilodelta.compress.distill.job.job import Job, groups_of
from kilodelta.compress.distill.options import Options
from kilodelta.compress.distill.precisions.wishes import longest_fidelity
from kilodelta.files.checkpoint import Checkpoint, in_name_order
from kilodelta.files.tensor import RawTensor
from kilodelta.format.delta import Delta
from kilodelta.format.manifest import Base, Grid, Manifest
from kilodelta.format.methods import Method
from kilodelta.format.quantise import Scale
from kilodelta.format.targets import Patterns, Target
from kilodelta.grid.model import QuantisedModel
from kilodelta.merging.build import FINGERPRINTED

DEFAULT_BUDGET = 20_000
LONGEST_MADE: Mapping[str, str | int | float | bool] = {
    "tool": f"kilodelta {__version__}",
    "agreement": -0.1234,
    "agreement_counts": "yes-no",
    "base_agreement": -0.1234,
    "distance": 10.12345,
    "held_out": 100000,
    "inputs": "0" * 12,
    "interrupted": True,
    "steps": 100000,
    "weight_error": 10.1234,
}
"""The longest report that a manifest holds."""
LONGEST_TUNED = {"rate": -1.2345678901234567e-100, "trials": 100}
"""What is added where a rate was searched for."""
OFFSETS = 16
"""Bytes that a tensor's shape and place in the file may take beyond those of an empty one."""


def choose_method(
    base: Checkpoint,
    targets: tuple[Target, ...],
    patterns: Patterns,
    parts: Split,
    config: Mapping[str, Any],
    options: Options,
    *,
    quantised: QuantisedModel | None = None,
) -> budgets.Choice:
    """Choose the method given by hand, or the one that the budget buys.

    Args:
        base: the base's files.
        targets: what coefficients change, in file order.
        patterns: the globs that choose exactly these.
        parts: how each change travels; extras count against the budget.
        config: what the fine-tune changed in the base's configuration, likewise.
        options: how the user wants it.
        quantised: the base as it is stored, if it is quantised.

    Raises:
        InputError: the budget buys nothing, or not what was given by hand.
    """
    bits = budgets.BITS if options.bits is None else options.bits
    count = _Overhead(
        base=base,
        targets=targets,
        patterns=patterns,
        parts=parts,
        config=config,
        options=options,
        bits=bits,
        quantised=quantised,
    )
    overhead = count.of
    given = options.method
    if given is None or isinstance(given, str):
        budget = DEFAULT_BUDGET if options.budget is None else options.budget
        return budgets.choose(budget, overhead, targets, bits=bits, family=given)
    choice = budgets.Choice(method=given, bits=bits)
    if options.budget is not None:
        budgets.check_fits(choice, options.budget, overhead, targets)
    return choice


def file_bytes(job: Job) -> int:
    """Count the most bytes that a job's file takes: its header, extras and coefficients."""
    overhead = _Overhead(
        base=job.pair.base,
        targets=job.targets,
        patterns=job.patterns,
        parts=job.split,
        config=job.config,
        options=job.options,
        bits=job.bits,
        quantised=job.quantised,
    )
    return overhead.of(job.method) + budgets.size_of(job.method, job.targets, job.bits)


def require_budget(job: Job, budget: int) -> None:
    """Check that another budget than the job's buys a file as well.

    Raises:
        InputError: it does not.
    """
    options = replace(job.options, budget=budget)
    parts = job.pair.base, job.targets, job.patterns, job.split, job.config
    choose_method(*parts, options, quantised=job.quantised)


@dataclass(frozen=True, kw_only=True)
class _Overhead:
    """What the bytes beside the coefficients depend on, the method apart."""

    base: Checkpoint
    targets: tuple[Target, ...]
    patterns: Patterns
    parts: Split
    config: Mapping[str, Any]
    options: Options
    bits: int
    quantised: QuantisedModel | None

    def of(self, method: Method) -> int:
        """Count them: extras, and a header written with none of both."""
        extras = self.parts.extras
        names = in_name_order(change.name for change in extras)
        manifest = Manifest(
            base=self._base(),
            method=method,
            seed=self.options.seed,
            patterns=self.patterns,
            count=len(self.targets),
            bits=self.bits,
            scales=(Scale(),) * len(groups_of(method, self.targets)),
            extras=names,
            result=_DIGEST,
            made={
                **LONGEST_MADE,
                **longest_fidelity(self.options.precisions),
                **({} if self.options.tune is None else LONGEST_TUNED),
            },
            config=self.config,
            grid=None if self.quantised is None else _longest_grid(self.quantised),
            beside="" if self.quantised is None else _DIGEST,
        )
        empty = np.empty(0, np.uint8)
        none = {c.name: RawTensor(dtype="F32", shape=(0, *c.shape[1:]), data=empty) for c in extras}
        header = Delta(manifest=manifest, blob=empty, extras=none).file_size()
        return header + OFFSETS * (1 + len(extras)) + sum(change.nbytes for change in extras)

    def _base(self) -> Base:
        source = self.base if self.quantised is None else self.quantised.source
        count = len(source.names)
        prints = b"\0" * 2 * count if count <= FINGERPRINTED else b""
        name = self.options.name or self.base.path.name
        return Base(name=name, root=_DIGEST, tensors=count, fingerprints=prints)


_DIGEST = "sha256:" + "0" * 64


def _longest_grid(model: QuantisedModel) -> Grid:
    """Return a grid whose text is as long as the model's can be."""
    kinds = {f"int4 {rows}x{columns}" for rows, columns in (w.shape for w in model.stored.values())}
    return Grid(
        logical=_DIGEST,
        grids=_DIGEST,
        plain=_DIGEST,
        config=_DIGEST,
        weights=len(model.stored),
        kinds=tuple(sorted(kinds)),
    )
