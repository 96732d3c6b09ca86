"""Check whether a delta fits a base: its targets, its bytes, and the exactness of its sums."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from kilodelta.errors import BaseMismatchError, FileError
from kilodelta.exact.bounds import exactness
from kilodelta.format.blob import Blob
from kilodelta.format.manifest import Manifest
from kilodelta.format.methods import Method
from kilodelta.format.targets import Target

_FETCH = "the file was not written by kilodelta: fetch it again"


def check_fit(blob: Blob, extras: Collection[str]) -> None:
    """Check what can be checked without the base's bytes.

    Args:
        blob: the delta's coefficients, with the targets that its patterns choose in the base.
        extras: the names of the tensors that it stores whole.

    Raises:
        BaseMismatchError: the targets or the coefficients do not fit the base.
        FileError: a target is an extra as well, or an update cannot be exact.
    """
    manifest, targets = blob.manifest, blob.targets
    _check_targets(manifest, targets, extras)
    if blob.data.size != blob.needed:
        raise BaseMismatchError(
            f"the file holds {blob.data.size} bytes of coefficients; this model needs"
            f" {blob.needed}",
            fix=f"the file was made for {manifest.base.name!r}: give that model",
        )
    for target in targets:
        if isinstance(manifest.method, Method):
            _check_exact(blob, manifest.method, target)
        else:
            _check_finite(blob, target)


def _check_targets(manifest: Manifest, targets: Sequence[Target], extras: Collection[str]) -> None:
    if len(targets) != manifest.count:
        what = "matrices" if manifest.patterns.stacked else "tensors"
        raise BaseMismatchError(
            f"the patterns match {len(targets)} {what} of this model, not {manifest.count}",
            fix=f"the file was made for {manifest.base.name!r}: give that model",
        )
    for target in targets:
        if manifest.compat is None and manifest.method.rank > max(target.matrix):
            raise FileError(
                f"rank {manifest.method.rank} is larger than both sides of {target.name}"
                f" {target.shape}",
                fix="the file is damaged or for another model: fetch it again",
            )
        if target.tensor in extras:
            raise FileError(f"{target.tensor} is a target and an extra as well", fix=_FETCH)
    problem = "" if manifest.compat is None else manifest.compat.problem(tuple(targets))
    if problem:
        raise BaseMismatchError(
            f"{manifest.method.name}: {problem}",
            fix=f"the file was made for {manifest.base.name!r}: give that model",
        )


def _check_exact(blob: Blob, method: Method, target: Target) -> None:
    c, e = blob.scale(method, target)
    problem = exactness(c * method.bound(blob.of(target)), e)
    if problem:
        raise FileError(f"the update of {target.name} cannot be exact: {problem}", fix=_FETCH)


def _check_finite(blob: Blob, target: Target) -> None:
    for group, values in blob.of(target).items():
        if not np.isfinite(values).all():
            raise FileError(f"group {group} of {target.name} holds NaN or infinity", fix=_FETCH)
