"""Choose the tensors of a base that a delta changes, and view each as a matrix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

from kilodelta.files import dtypes
from kilodelta.files.checkpoint import in_name_order
from kilodelta.files.tensor import GRID, TensorInfo

Shape = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Patterns:
    """Case-sensitive shell globs over tensor names; `*` matches dots as well.

    A target is a tensor that matches a glob of `include` and none of `exclude`; one that matches
    a glob of `transposed` is stored (in, out).
    """

    include: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Target:
    """One tensor that a delta changes; `index` is its position among the targets."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    transposed: bool
    index: int

    @property
    def stored(self) -> Shape:
        """The stored tensor's shape as a matrix: all dimensions but the first are flattened."""
        return self.shape[0], prod(self.shape[1:])

    @property
    def matrix(self) -> Shape:
        """The shape (D, d) = (out, in) of the weights as the methods see them."""
        return self.stored[::-1] if self.transposed else self.stored


def matches(name: str, globs: Iterable[str]) -> bool:
    """Return whether a name matches one of the globs.

    Example:
        >>> matches("encoder.layer.0.output.weight", ("encoder.*.weight",))
        True
    """
    return any(fnmatchcase(name, glob) for glob in globs)


def select(tensors: Iterable[TensorInfo], patterns: Patterns) -> tuple[Target, ...]:
    """Choose the targets in a model, in name order: float tensors of two or more dimensions, and
    quantised weights, which come as (out, in) of dtype `GRID` and are never transposed."""
    chosen = {info.name: info for info in tensors if _is_target(info, patterns)}
    return tuple(
        Target(
            name=name,
            dtype=chosen[name].dtype,
            shape=chosen[name].shape,
            transposed=chosen[name].dtype != GRID and matches(name, patterns.transposed),
            index=index,
        )
        for index, name in enumerate(in_name_order(chosen))
    )


def _is_target(info: TensorInfo, patterns: Patterns) -> bool:
    return (
        (info.dtype in dtypes.TARGETS or info.dtype == GRID)
        and len(info.shape) >= 2
        and prod(info.shape) > 0
        and matches(info.name, patterns.include)
        and not matches(info.name, patterns.exclude)
    )
