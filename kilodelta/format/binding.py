"""What must hold of a delta and the base that it is bound to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kilodelta.errors import BaseMismatchError, FileError
from kilodelta.format.exactness import exactness
from kilodelta.format.targets import Target

if TYPE_CHECKING:
    from kilodelta.format.delta import Delta


def check_binding(delta: Delta) -> None:
    """Its targets, its bytes and what they stand for.

    Raises:
        BaseMismatchError: the targets or the coefficients do not fit the base.
        FileError: the coefficients break the exactness bound.
    """
    _check_fit(delta)
    for target in delta.layout or ():
        (_check_exact if delta.manifest.compat is None else _check_floats)(delta, target)


def _check_fit(delta: Delta) -> None:
    manifest, method = delta.manifest, delta.form
    layout = delta.layout or ()
    if len(layout) != manifest.count:
        raise BaseMismatchError(
            f"the patterns match {len(layout)} tensors of this model, not {manifest.count}",
            fix=f"the file was made for {manifest.base.name!r}: give that model",
        )
    for target in layout:
        if manifest.compat is None and method.rank > max(target.matrix):
            raise FileError(
                f"rank {method.rank} is larger than both sides of {target.name} {target.shape}",
                fix="the file is damaged or for another model: fetch it again",
            )
        if target.name in delta.extras:
            raise FileError(
                f"{target.name} is a target and an extra too",
                fix="the file was not written by kilodelta: fetch it again",
            )
    problem = manifest.compat.problem(layout) if manifest.compat is not None else ""
    if problem:
        raise BaseMismatchError(
            f"{method.name}: {problem}", fix=f"the file was made for {manifest.base.name!r}"
        )
    if delta.blob.size != delta.blob_size:
        raise BaseMismatchError(
            f"the file holds {delta.blob.size} bytes of coefficients; this model needs"
            f" {delta.blob_size}",
            fix=f"the file was made for {manifest.base.name!r}: give that model",
        )


def _check_exact(delta: Delta, target: Target) -> None:
    c, e = delta.scale(target.name)
    problem = exactness(c * delta.method.bound(delta.coefficients(target.name)), e)
    if problem:
        raise FileError(
            f"the update of {target.name} cannot be exact: {problem}",
            fix="the file was not written by kilodelta: fetch it again",
        )


def _check_floats(delta: Delta, target: Target) -> None:
    for group, values in delta.coefficients(target.name).items():
        if not np.isfinite(values).all():
            raise FileError(
                f"group {group} of {target.name} holds NaN or infinity",
                fix="the file was not written by kilodelta: fetch it again",
            )
