"""Choose the tensors of a base that a delta changes, and view each as a matrix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

from kilodelta.errors import InputError
from kilodelta.files import dtypes
from kilodelta.files.checkpoint import in_name_order
from kilodelta.files.tensor import GRID, TensorInfo

Shape = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Patterns:
    """Case-sensitive shell globs over tensor names; `*` matches dots as well.

    A tensor that matches a glob of `include` and none of `exclude` is a target; one that matches
    a glob of `transposed` is stored (in, out). A three-dimensional one that matches a glob of
    `stacked`, such as the experts of a mixture in one tensor, is as many targets as its first
    dimension is long.
    """

    include: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    stacked: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Target:
    """One matrix that a delta changes: a tensor of the base, or one matrix of a stack.

    Attributes:
        name: the tensor's; of matrix `i` of a stack, that name and `[i]`.
        dtype: the tensor's.
        shape: the matrix's as it is stored; a convolution has more than two dimensions.
        transposed: whether it is stored (in, out).
        index: its position among the targets.
        part: its place in a stack; None where it is a whole tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    transposed: bool
    index: int
    part: int | None = None

    @property
    def tensor(self) -> str:
        """The name of the base's tensor that holds it.

        Example:
            >>> shape, turned = (8, 4), False
            >>> Target(
            ...     name="w[3]", dtype="F32", shape=shape, transposed=turned, index=3, part=3
            ... ).tensor
            'w'
        """
        return self.name if self.part is None else self.name.removesuffix(f"[{self.part}]")

    @property
    def nbytes(self) -> int:
        """The bytes that it takes in the base."""
        return dtypes.nbytes(self.dtype, self.shape)

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
    """Choose the targets in a model, in name order, the matrices of a stack in their own.

    They are float tensors of two or more dimensions, and quantised weights, which come as
    (out, in) of dtype `GRID` and are neither stacked nor transposed.

    Example:
        >>> experts = TensorInfo(name="experts", dtype="F32", shape=(2, 8, 4))
        >>> chosen = select([experts], Patterns(include=("*",), stacked=("experts",)))
        >>> [(target.name, target.matrix) for target in chosen]
        [('experts[0]', (8, 4)), ('experts[1]', (8, 4))]

    Raises:
        InputError: a tensor has the name of a matrix of a stack.
    """
    chosen = {info.name: info for info in tensors if _is_target(info, patterns)}
    targets: list[Target] = []
    for name in in_name_order(chosen):
        info = chosen[name]
        is_stack = len(info.shape) == 3 and matches(name, patterns.stacked)
        for part in range(info.shape[0]) if is_stack else (None,):
            targets.append(
                Target(
                    name=name if part is None else f"{name}[{part}]",
                    dtype=info.dtype,
                    shape=info.shape if part is None else info.shape[1:],
                    transposed=info.dtype != GRID and matches(name, patterns.transposed),
                    index=len(targets),
                    part=part,
                )
            )
    if patterns.stacked:
        _check_names(targets)
    return tuple(targets)


def _check_names(targets: Iterable[Target]) -> None:
    """Refuse two targets of one name, of which programs would see one only."""
    names: set[str] = set()
    for target in targets:
        if target.name in names:
            raise InputError(
                f"{target.name} is both a tensor of the base and a matrix of the stack"
                f" {target.name.rpartition('[')[0]}",
                fix="exclude one of the two from the targets",
            )
        names.add(target.name)


def by_tensor(targets: Iterable[Target]) -> dict[str, tuple[Target, ...]]:
    """Group targets by the base's tensors that hold them, in target order."""
    found: dict[str, list[Target]] = {}
    for target in targets:
        found.setdefault(target.tensor, []).append(target)
    return {name: tuple(parts) for name, parts in found.items()}


def _is_target(info: TensorInfo, patterns: Patterns) -> bool:
    return (
        (info.dtype in dtypes.TARGETS or info.dtype == GRID)
        and len(info.shape) >= 2
        and prod(info.shape) > 0
        and matches(info.name, patterns.include)
        and not matches(info.name, patterns.exclude)
    )
