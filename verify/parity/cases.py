"""The shapes and paddings at which artefacts are compared, filled with real inputs.

=============  =================================================================================
smallest       the profile's smallest shapes, every position a real token
usual          the usual shapes; at least one row is padded on the right
largest        the largest shapes, every position a real token, so that the last is computed
left-padded    the usual shapes padded on the left, as decoders are given batches
=============  =================================================================================

A decoder's query at a position padded on the left sees no key at all: torch's fused attention
returns zeros there, its eager one an average, a runtime either. So an output that the model itself
takes from such a position (CLIP's text embedding is that of the first end-of-text token, which may
be padding) has no right value, and is compared in the other cases alone (`Reference.undefined`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kilodelta.verify.parity.fitting import MASK as MASK
from kilodelta.verify.parity.fitting import Padding, fit
from kilodelta.verify.runners.runner import Batch


@dataclass(frozen=True, kw_only=True)
class Case:
    """Inputs at one point of a profile."""

    name: str
    batch: Batch

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first input, for reports."""
        return next(iter(self.batch.values())).shape

    @property
    def length(self) -> int | None:
        """Tokens of a row, padding included; None for inputs without a mask."""
        return self.batch[MASK].shape[1] if MASK in self.batch else None


LEFT = "left-padded"

_PLAN: tuple[tuple[str, int, Padding], ...] = (
    ("smallest", 0, "none"),
    ("usual", 1, "right"),
    ("largest", 2, "none"),
    (LEFT, 1, "left"),
)


def cases(
    batch: Batch,
    profile: Mapping[str, Sequence[tuple[int, ...]]],
    *,
    left: bool = False,
    whole: bool = False,
) -> tuple[Case, ...]:
    """Return the cases of a profile; those that would be equal come once.

    Args:
        batch: real inputs by name.
        profile: by input its smallest, usual and largest shape.
        left: the model is a decoder, so add the left-padded case.
        whole: rows stay as they are, without another padding than their own.
    """
    chosen: dict[object, Case] = {}
    for name, point, padding in _PLAN:
        shapes = {key: tuple(points[point]) for key, points in profile.items()}
        padded: Padding = padding if MASK in shapes and shapes[MASK][1] > 1 else "none"
        if whole:
            padded = "own"
        if padding == "left" and not (left and padded == "left"):
            continue
        key = (tuple(shapes.values()), padded)
        if key not in chosen:
            chosen[key] = Case(name=name, batch=fit(batch, shapes, padding=padded))
    return tuple(chosen.values())


def live(output: NDArray[Any], batch: Batch, axis: int | None = None) -> NDArray[Any]:
    """Return the entries of an output at positions that are not padding, `(positions, ...)`.

    Args:
        output: any output (rows, ...); returned as it is if it has no axis of tokens.
        batch: the inputs that it was computed from.
        axis: the output's axis of tokens. By default the second one, of an output (rows, tokens,
            ...) with at least three axes; an output (rows, classes) would look the same with two.
    """
    mask = batch.get(MASK)
    if axis is None:
        axis = 1 if output.ndim >= 3 else output.ndim
    if mask is None or axis >= output.ndim:
        return output
    turned = np.moveaxis(output, axis, 1)
    if turned.shape[:2] != mask.shape:
        return output
    entries: NDArray[Any] = turned[mask.astype(bool)]
    return entries


def refilled(batch: Batch) -> Batch:
    """Return the inputs with other tokens where the mask leaves them out.

    Every row of ids, segments or embeddings takes the padded entries of the reversed row: as real
    as before, and in other places.

    Example:
        >>> ids, mask = np.array([[7, 8, 5, 6]]), np.array([[0, 0, 1, 1]])
        >>> refilled({"input_ids": ids, "attention_mask": mask})["input_ids"].tolist()
        [[6, 5, 5, 6]]
    """
    mask = batch[MASK].astype(bool)
    changed = {}
    for name, array in batch.items():
        is_content = name != MASK and "position" not in name and array.shape[:2] == mask.shape
        kept = mask.reshape(*mask.shape, *([1] * (array.ndim - 2)))
        changed[name] = np.where(kept, array, array[:, ::-1]) if is_content else array
    return changed


def token_axis(shapes: Sequence[tuple[int, ...]], lengths: Sequence[int | None]) -> int | None:
    """Return the axis of an output that follows the number of tokens in every case.

    Args:
        shapes: the output's shape in each case.
        lengths: the tokens of a row in each case.

    Returns:
        the first such axis after the rows. None if there is none, or if all cases are equally long
        and so do not tell; `live` then looks at the number of axes.

    Example:
        >>> token_axis([(1, 4), (2, 9)], [4, 9]), token_axis([(1, 3), (2, 3)], [4, 9])
        (1, None)
    """
    if None in lengths or len(set(lengths)) < 2:
        return None
    axes = range(1, min(map(len, shapes), default=0))
    follows = (
        axis
        for axis in axes
        if all(shape[axis] == n for shape, n in zip(shapes, lengths, strict=True))
    )
    return next(follows, None)
