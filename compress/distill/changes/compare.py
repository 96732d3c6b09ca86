"""Compare two checkpoints tensor by tensor, also across float types and tied names.

A base in bfloat16 and a fine-tune of it saved in float32 (or the reverse) differ in every byte
and perhaps in no value: what counts is whether the base's type could hold a difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import hypot, inf, prod

import numpy as np
import torch

from kilodelta.errors import BaseMismatchError, CheckpointError
from kilodelta.files import dtypes
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.models.weights import dtype_of

SAMPLE = 256
"""Bytes at either end of a tensor that are compared first."""
BLOCK = 1 << 20
"""Elements compared at a time."""
_FLOATS = dtypes.TARGETS | {"F64"}


@dataclass(frozen=True, kw_only=True)
class Change:
    """One tensor of the tuned model that differs from the base's.

    Attributes:
        name: its name in the base's files, or in the tuned model's where the base lacks it.
        dtype: the safetensors dtype in which it would be stored: the base's, where it has one.
        shape: its shape in the tuned model.
        norm: Frobenius norm of the change; infinite for a tensor that is new, 0 for integers.
        relative: `norm` over the norm of the base's tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    norm: float
    relative: float

    @property
    def nbytes(self) -> int:
        """Bytes that it takes when it is stored whole."""
        return dtypes.nbytes(self.dtype, self.shape)

    @property
    def is_new(self) -> bool:
        """Whether the base has no tensor of this name and shape, or one of another kind."""
        return self.norm == inf

    @property
    def is_matrix(self) -> bool:
        """Whether arithmetic can change it: a float tensor of two or more dimensions, not new."""
        return (
            not self.is_new
            and self.dtype in dtypes.TARGETS
            and len(self.shape) >= 2
            and prod(self.shape) > 0
        )


def compare(
    base: Checkpoint, tuned: Checkpoint, repeats: Mapping[str, str] | None = None
) -> tuple[Change, ...]:
    """List every tensor of the tuned model whose values are not the base's, in name order.

    Two float tensors count as equal where either equals the other rounded to its type: then the
    difference is that rounding alone, and no update could carry it.

    Args:
        base: the base model.
        tuned: the tuned model, its tensors under the base's names.
        repeats: names that only `tuned` has, each with the name of the tensor that it is tied to
            in the base model. Where both hold the same values, the name is a copy and no change.

    Raises:
        BaseMismatchError: the two have no tensor in common, or none differs.
        CheckpointError: a tensor that differs holds NaN, or infinity where the base has a number;
            or a matrix of the base does, where the tuned model has a number.
    """
    if not any(name in base for name in tuned.names):
        raise BaseMismatchError(
            f"{tuned.path} and {base.path} have no tensor name in common",
            fix="give a fine-tune of this base, saved with the same architecture",
        )
    copies = {
        name
        for name, original in (repeats or {}).items()
        if name in tuned and original in tuned and _equal(tuned, name, tuned, original)
    }
    found = [_change(base, tuned, name) for name in tuned.names if name not in copies]
    changes = tuple(change for change in found if change is not None)
    if not changes:
        raise BaseMismatchError(
            f"{tuned.path} holds the values of {base.path}, every one",
            fix="give the base first and the tuned model second",
        )
    return changes


def equal_tensors(checkpoint: Checkpoint, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Find matrices that hold the same bytes under several names, as files of tied models may.

    Args:
        checkpoint: the model.
        names: the names to look at.

    Returns:
        For each name that has equals: all names of its group, in the order given. Matrices of one
        repeated value (zeros at the start) do not count: their equality is chance.
    """
    groups: dict[tuple[object, ...], list[list[str]]] = {}
    for name in names:
        info = checkpoint.info(name)
        if info.dtype not in dtypes.TARGETS or len(info.shape) < 2 or not prod(info.shape):
            continue
        data = checkpoint.tensor(name)
        # Most matrices differ in their first bytes: a model is not read whole for each pair.
        sample = data[:SAMPLE].tobytes(), data[-SAMPLE:].tobytes()
        same_kind = groups.setdefault((info.dtype, info.shape, *sample), [])
        for group in same_kind:
            if _same_bytes(checkpoint, group[0], checkpoint, name):
                group.append(name)
                break
        else:
            same_kind.append([name])
    found = [g for same_kind in groups.values() for g in same_kind if len(g) > 1]
    varied = [group for group in found if _varies(checkpoint, group[0])]
    return {name: tuple(group) for group in varied for name in group}


def energy(changes: Sequence[Change]) -> float:
    """Add up the squared norms of the changes that have one."""
    return sum(change.norm**2 for change in changes if not change.is_new)


def _varies(checkpoint: Checkpoint, name: str) -> bool:
    (first, *_), *_ = (part[:1] for part in _parts(checkpoint, name))
    return any(bool((part != first).any()) for part in _parts(checkpoint, name))


def _change(base: Checkpoint, tuned: Checkpoint, name: str) -> Change | None:
    info = tuned.info(name)
    if name not in base or base.info(name).shape != info.shape:
        if info.dtype in _FLOATS and any(bool(part.isnan().any()) for part in _parts(tuned, name)):
            raise _no_numbers(tuned, name, "NaN")
        return Change(name=name, dtype=info.dtype, shape=info.shape, norm=inf, relative=inf)
    if _equal(base, name, tuned, name):
        return None
    kept = base.info(name).dtype
    if not {kept, info.dtype} <= _FLOATS:
        norm = 0.0 if kept == info.dtype else inf  # a counter's step is no energy
        return Change(name=name, dtype=info.dtype, shape=info.shape, norm=norm, relative=norm)
    norm, relative = _norms(base, tuned, name)
    return Change(name=name, dtype=kept, shape=info.shape, norm=norm, relative=relative)


_INTEGERS = frozenset({"BOOL", "U8", "I8", "I16", "I32", "I64"})


def _equal(left: Checkpoint, first: str, right: Checkpoint, second: str) -> bool:
    """Return whether two tensors hold the same values, up to rounding between float types."""
    ours, theirs = left.info(first), right.info(second)
    if ours.shape != theirs.shape:
        return False
    if ours.dtype == theirs.dtype and _same_bytes(left, first, right, second):
        return True
    floats = {ours.dtype, theirs.dtype} <= _FLOATS
    integers = {ours.dtype, theirs.dtype} <= _INTEGERS
    if not floats and not integers:
        return False
    pairs = zip(_parts(left, first), _parts(right, second), strict=True)
    if integers:
        return all(torch.equal(a.long(), b.long()) for a, b in pairs)
    narrows = widens = True  # one of the two for the whole tensor, not for each part
    for a, b in pairs:
        narrows = narrows and _same_values(a.to(b.dtype), b)
        widens = widens and _same_values(a, b.to(a.dtype))
        if not (narrows or widens):
            return False
    return True


def _same_bytes(left: Checkpoint, first: str, right: Checkpoint, second: str) -> bool:
    ours, theirs = left.tensor(first), right.tensor(second)
    if ours.size != theirs.size:
        return False
    pairs = zip(ours.chunks(), theirs.chunks(), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def _parts(checkpoint: Checkpoint, name: str) -> Iterator[torch.Tensor]:
    """Read a tensor's elements in order, `BLOCK` at a time, in its own dtype, `(n,)`.

    Raises:
        CheckpointError: it is of a type that models do not compute with.
    """
    info = checkpoint.info(name)
    dtype = dtype_of(checkpoint, name)
    for data in checkpoint.tensor(name).chunks(BLOCK * dtypes.DTYPES[info.dtype].bits // 8):
        # The next chunk overwrites these bytes, while its values may still be in use.
        yield torch.from_numpy(data.copy()).view(dtype)


def _same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal element by element; NaN equals NaN, and -0 equals 0."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def _norms(base: Checkpoint, tuned: Checkpoint, name: str) -> tuple[float, float]:
    """Return the norm of the change, and over the norm of the base's tensor, in float64."""
    change, size = 0.0, 0.0
    for old, new in zip(_parts(base, name), _parts(tuned, name), strict=True):
        if bool((old.isfinite() & ~new.isfinite()).any()):
            raise _no_numbers(tuned, name, "NaN or infinity")
        # A statistic may begin at infinity and be stored whole; to a matrix an update is added.
        if len(tuned.info(name).shape) >= 2 and bool((~old.isfinite() & new.isfinite()).any()):
            raise CheckpointError(
                f"{base.path}: {name} holds NaN or infinity where {tuned.path} has a number",
                fix="give the base that the fine-tune began from; this file may be damaged",
            )
        before = old.double()
        change = hypot(change, _norm(new.double() - before))
        size = hypot(size, _norm(before))
    return change, change / max(size, 1e-30)


def _no_numbers(tuned: Checkpoint, name: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{tuned.path}: {name} holds {what}",
        fix="the fine-tune diverged, or the file is damaged: give another checkpoint of it",
    )


def _norm(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(torch.nan_to_num(values)))
