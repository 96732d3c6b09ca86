"""What a fine-tune changed: tensor by tensor, and which of it a delta should carry how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from kilodelta.errors import BaseMismatchError, InputError
from kilodelta.files import dtypes
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.targets import matches
from kilodelta.models.weights import tensor


@dataclass(frozen=True, kw_only=True)
class Change:
    """One tensor that differs: `norm` is the change's Frobenius norm, `relative` that over the
    base's norm; both are infinite for a tensor that is new or of another shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    norm: float
    relative: float

    @property
    def is_new(self) -> bool:
        """The base has no tensor of this name and shape."""
        return self.norm == float("inf")


@dataclass(frozen=True, kw_only=True)
class Split:
    """How the changes travel: as coefficients, whole, or not at all."""

    targets: tuple[Change, ...]
    extras: tuple[Change, ...]
    dropped: tuple[Change, ...]


def compare(base: Checkpoint, tuned: Checkpoint) -> tuple[Change, ...]:
    """Every tensor of the tuned model that is not bit for bit the base's, in name order.

    Raises:
        BaseMismatchError: the two have no tensor in common, or none differs.
    """
    shared = [name for name in tuned.names if name in base]
    if not shared:
        raise BaseMismatchError(
            f"{tuned.path} and {base.path} have no tensor name in common",
            fix="give a fine-tune of this base, saved with the same architecture",
        )
    found = [change for name in tuned.names if (change := _change(base, tuned, name))]
    if not found:
        raise BaseMismatchError(
            f"{tuned.path} equals {base.path} bit for bit", fix="give the tuned model second"
        )
    return tuple(found)


def _change(base: Checkpoint, tuned: Checkpoint, name: str) -> Change | None:
    info = tuned.info(name)
    if name not in base or (base.info(name).shape, base.info(name).dtype) != (
        info.shape,
        info.dtype,
    ):
        norm = relative = float("inf")
    elif bytes(base.data(name)) == bytes(tuned.data(name)):
        return None
    else:
        norm, relative = _norms(base, tuned, name)
    return Change(
        name=name,
        dtype=info.dtype,
        shape=info.shape,
        nbytes=info.nbytes,
        norm=norm,
        relative=relative,
    )


def _norms(base: Checkpoint, tuned: Checkpoint, name: str) -> tuple[float, float]:
    before = tensor(base, name).double()
    norm = float(torch.linalg.vector_norm(tensor(tuned, name).double() - before))
    return norm, norm / max(float(torch.linalg.vector_norm(before)), 1e-30)


def is_matrix(change: Change) -> bool:
    """Whether arithmetic can change it: a float tensor of two or more dimensions, not new."""
    return (
        not change.is_new
        and change.dtype in dtypes.TARGETS
        and len(change.shape) >= 2
        and prod(change.shape) > 0
    )


def split(
    changes: Sequence[Change],
    *,
    include: Sequence[str],
    exclude: Sequence[str],
    extras: str,
    layers: Sequence[str],
    buffers: Sequence[str],
) -> Split:
    """Decide what becomes coefficients, what is stored whole, and what is left behind.

    Args:
        include: globs of targets; empty means every changed matrix of `layers`.
        extras: `auto` stores what coefficients cannot carry and no training makes up for (tensors
            that are new or of another shape or type, and running statistics), `all` stores every
            other change too, `none` only what is new, anything else is a glob on top of `auto`.
        layers: names of the weights of linear and convolution layers.
        buffers: names of what is no parameter.

    Raises:
        InputError: nothing is left to be a target.
    """
    wanted = [
        change
        for change in changes
        if is_matrix(change)
        and not matches(change.name, exclude)
        and (matches(change.name, include) if include else change.name in layers)
    ]
    if not wanted:
        raise InputError(
            "no changed matrix is left to compress",
            fix="name them with --targets, or loosen --exclude; see kilodelta digest --tensors",
        )
    names = {change.name for change in wanted}
    rest = [change for change in changes if change.name not in names]
    whole = {change.name for change in rest if _is_extra(change, extras, buffers)}
    return Split(
        targets=tuple(wanted),
        extras=tuple(change for change in rest if change.name in whole),
        dropped=tuple(change for change in rest if change.name not in whole),
    )


def _is_extra(change: Change, policy: str, buffers: Sequence[str]) -> bool:
    if change.is_new or policy == "all":
        return True
    if policy == "none":
        return False
    if change.name in buffers or change.dtype not in dtypes.TARGETS | {"F64"}:
        return True
    return policy != "auto" and matches(change.name, policy.split(","))


def energy(changes: Sequence[Change]) -> float:
    """The sum of squared norms of the changes that have one."""
    return sum(change.norm**2 for change in changes if not change.is_new)


def patterns_for(chosen: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    """Few short globs that match all chosen names and none of the others.

    The manifest stores these, so a hundred layers cost a dozen characters.
    """
    left, found = set(chosen), []
    candidates = sorted({glob for name in chosen for glob in _globs(name)}, key=len)
    reach = {
        glob: {name for name in chosen if matches(name, (glob,))}
        for glob in candidates
        if not any(matches(name, (glob,)) for name in others)
    }
    while left:
        best = max(reach, key=lambda glob: (len(reach[glob] & left), -len(glob)))
        found.append(best)
        left -= reach[best]
    return tuple(sorted(found))


def _globs(name: str) -> list[str]:
    """Ways to generalise a name: any front, any end, any layer number."""
    parts = name.split(".")
    numbered = ["*" if part.isdigit() else part for part in parts]
    fronts = [".".join(parts[:n]) + ".*" for n in range(1, len(parts))]
    ends = ["*." + ".".join(parts[-n:]) for n in range(1, len(parts))]
    masked = [".".join(numbered[:n]) + ".*" for n in range(1, len(parts))]
    both = [
        f"{'.'.join(parts[:n])}.*.{'.'.join(parts[-m:])}"
        for n in range(1, len(parts))
        for m in range(1, len(parts) - n)
    ]
    return [name, ".".join(numbered), *fronts, *ends, *masked, *both]
