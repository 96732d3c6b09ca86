"""Choose the method given by hand, or the one that the budget buys.

A budget is one of the whole file. So the bytes beside the coefficients are counted by writing a
header that is as long as any that can come of the job.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from kilodelta import __version__
from kilodelta.compress.distill import budget as budgets
from kilodelta.compress.distill.changes.split import Split
from kilodelta.compress.distill.job.job import groups_of
from kilodelta.compress.distill.options import Options
from kilodelta.files.checkpoint import Checkpoint, in_name_order
from kilodelta.files.tensor import RawTensor
from kilodelta.format.delta import Delta
from kilodelta.format.manifest import Base, Manifest
from kilodelta.format.methods import Method
from kilodelta.format.quantise import Scale
from kilodelta.format.targets import Patterns, Target
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
OFFSETS = 16
"""Bytes that a tensor's shape and place in the file may take beyond those of an empty one."""


def choose_method(
    base: Checkpoint,
    targets: tuple[Target, ...],
    patterns: Patterns,
    parts: Split,
    config: Mapping[str, Any],
    options: Options,
) -> budgets.Choice:
    """Choose the method given by hand, or the one that the budget buys.

    Args:
        base: the base's files.
        targets: what coefficients change, in file order.
        patterns: the globs that choose exactly these.
        parts: how each change travels; extras count against the budget.
        config: what the fine-tune changed in the base's configuration, likewise.
        options: how the user wants it.

    Raises:
        InputError: the budget buys nothing, or not what was given by hand.
    """
    bits = budgets.BITS if options.bits is None else options.bits
    overhead = partial(_overhead, base, targets, patterns, parts, config, options, bits)
    given = options.method
    if given is None or isinstance(given, str):
        budget = DEFAULT_BUDGET if options.budget is None else options.budget
        return budgets.choose(budget, overhead, targets, bits=bits, family=given)
    choice = budgets.Choice(method=given, bits=bits)
    if options.budget is not None:
        budgets.check_fits(choice, options.budget, overhead, targets)
    return choice


def _overhead(
    base: Checkpoint,
    targets: tuple[Target, ...],
    patterns: Patterns,
    parts: Split,
    config: Mapping[str, Any],
    options: Options,
    bits: int,
    method: Method,
) -> int:
    """Count the bytes beside the coefficients: extras, and a header written with none of both."""
    manifest = Manifest(
        base=Base(
            name=options.name or base.path.name,
            root="sha256:" + "0" * 64,
            tensors=len(base.names),
            fingerprints=b"\0" * 2 * len(base.names) if len(base.names) <= FINGERPRINTED else b"",
        ),
        method=method,
        seed=options.seed,
        patterns=patterns,
        count=len(targets),
        bits=bits,
        scales=(Scale(),) * len(groups_of(method, targets)),
        extras=in_name_order(change.name for change in parts.extras),
        result="sha256:" + "0" * 64,
        made=LONGEST_MADE,
        config=config,
    )
    empty = np.empty(0, np.uint8)
    extras = {
        c.name: RawTensor(dtype="F32", shape=(0, *c.shape[1:]), data=empty) for c in parts.extras
    }
    header = Delta(manifest=manifest, blob=empty, extras=extras).file_size()
    return header + OFFSETS * (1 + len(extras)) + sum(change.nbytes for change in parts.extras)
