"""A delta: one fine-tune of one base, as the file holds it and as exact integer updates."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kilodelta.errors import BaseMismatchError, FileError, InputError
from kilodelta.exact import products
from kilodelta.exact.bases import Stream
from kilodelta.exact.bounds import exactness
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.tensor import RawTensor, TensorInfo
from kilodelta.format.coefficients import Group, Ints, group_size, groups_size, unpack
from kilodelta.format.foreign import Compat, stored
from kilodelta.format.manifest import FLOATS, Manifest
from kilodelta.format.methods import Coefficients, Method
from kilodelta.format.targets import Target, select


@dataclass(frozen=True, kw_only=True)
class Factors:
    """One target's update 2^e * (c * left @ right), (out, in); all letters are integers."""

    left: Ints
    right: Ints
    c: int
    e: int


@dataclass(frozen=True, kw_only=True)
class Delta:
    """A fine-tune: the manifest, the packed coefficients, the tensors stored whole.

    A delta that was read alone knows its coefficients but not its targets' shapes; `bind` it to
    the base before asking for updates.

    Example:
        >>> import kilodelta
        >>> delta = kilodelta.load("task.kd", base="model/")  # doctest: +SKIP
        >>> delta.expand("encoder.layer.0.attention.self.query.weight").dtype  # doctest: +SKIP
        dtype('int64')
    """

    manifest: Manifest
    blob: npt.NDArray[np.uint8]
    extras: Mapping[str, RawTensor] = field(default_factory=dict)
    probes: Mapping[str, RawTensor] = field(default_factory=dict)
    layout: tuple[Target, ...] | None = None

    @property
    def method(self) -> Method:
        """The exact method.

        Raises:
            InputError: the file is a compatibility form; it can be merged, proved and inspected.
        """
        if self.manifest.compat is not None:
            raise InputError(
                f"{self.manifest.method.name} is a compatibility form: its basis is of floats, so "
                "it has no exact integer update",
                fix="kilodelta merge takes it as it is; for the rest import it with --requantise",
            )
        return self.manifest.method  # type: ignore[return-value]

    @property
    def form(self) -> Method | Compat:
        """The method, exact or not: what both have in common."""
        return self.manifest.method

    @property
    def stream(self) -> Stream:
        return Stream(self.manifest.seed)

    def bind(self, base: str | os.PathLike[str] | Checkpoint) -> Delta:
        """The same delta with its targets found in a base.

        Only shapes and counts are checked here; `kilodelta.verify` and `kilodelta.merge` check the
        base's digest.

        Raises:
            BaseMismatchError: the targets or the coefficients do not fit the base.
            FileError: the coefficients break the exactness bound.
        """
        checkpoint = Checkpoint.open(base if isinstance(base, Checkpoint) else Path(base))
        return self.bind_to(checkpoint.info(n) for n in checkpoint.names)

    def bind_to(self, tensors: Iterable[TensorInfo]) -> Delta:
        """`bind` for a base that is known only by what its tensors are, all of them.

        Raises:
            BaseMismatchError: the targets or the coefficients do not fit the base.
            FileError: the coefficients break the exactness bound.
        """
        layout = select(tensors, self.manifest.patterns)
        bound = replace(self, layout=layout)
        _check_binding(bound)
        return bound

    @cached_property
    def targets(self) -> Mapping[str, Target]:
        """The targets by name.

        Raises:
            InputError: the delta is not bound to a base.
        """
        if self.layout is None:
            raise InputError(
                "this delta does not know its targets' shapes yet",
                fix="kilodelta.load(path, base=...), or delta.bind(base)",
            )
        return {target.name: target for target in self.layout}

    def target(self, name: str) -> Target:
        """One target.

        Raises:
            InputError: no target has that name.
        """
        if name not in self.targets:
            raise InputError(
                f"{name!r} is not a target of this delta", fix="its targets are in delta.targets"
            )
        return self.targets[name]

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        """Where the shared groups and each target's begin in the blob."""
        starts, position = [0], groups_size(self.form.shared(), self.manifest.bits)
        for target in self.targets.values():
            starts.append(position)
            position += groups_size(self.form.groups(target), self.manifest.bits)
        return (*starts, position)

    @property
    def blob_size(self) -> int:
        """Bytes of coefficients that the targets need."""
        return self._starts[-1]

    @cached_property
    def _shared(self) -> Coefficients:
        return self._read(self.form.shared(), 0)

    def _read(self, groups: tuple[Group, ...], position: int) -> dict[str, Ints]:
        found = {}
        for group in groups:
            size = group_size(group, self.manifest.bits)
            data = self.blob[position : position + size]
            found[group.name] = self._unpack(data, group).reshape(group.shape)
            position += size
        return found

    def _unpack(self, data: Ints, group: Group) -> Ints:
        if self.manifest.compat is None:
            return unpack(data, group.size, self.manifest.bits)
        return stored.unpack(data, group.dtype or FLOATS[self.manifest.bits])

    def coefficients(self, name: str) -> Coefficients:
        """A target's coefficients by group, int8 or int16, shared groups among them; float32 in a
        compatibility form."""
        target = self.target(name)
        own = self._read(self.form.groups(target), self._starts[1 + target.index])
        return {**self._shared, **own}

    def scale(self, name: str) -> tuple[int, int]:
        """(C, e) of a target: the product of its groups' c, the sum of their e."""
        target = self.target(name)
        shared, own = self.method.shared(), self.method.groups(target)
        scales = dict(zip((group.name for group in shared), self.manifest.scales, strict=False))
        start = len(shared) + target.index * len(own)
        scales |= zip((group.name for group in own), self.manifest.scales[start:], strict=False)
        chosen = [scales[group] for group in self.method.scales()]
        return prod(scale.c for scale in chosen), sum(scale.e for scale in chosen)

    def factors(self, name: str) -> Factors:
        """A target's update as two integer factors, (out, K) and (K, in)."""
        target, q = self.target(name), self.coefficients(name)
        c, e = self.scale(name)
        rows = range(target.matrix[0])
        return Factors(
            left=self.method.left(q, target, self.stream, rows),
            right=self.method.right(q, target, self.stream),
            c=c,
            e=e,
        )

    def expand(self, name: str) -> npt.NDArray[np.int64]:
        """The exact integer update dQ of a target, int64 (out, in); the weights change by
        `2^e * C * dQ` with (C, e) from `scale`."""
        factors = self.factors(name)
        bound = self.method.bound(self.coefficients(name))
        return products.product(factors.left, factors.right, bound).astype(np.int64)

    def update(self, name: str) -> npt.NDArray[np.float32]:
        """What a merge adds to a target, float32 (out, in), before the weights' own rounding."""
        compat = self.manifest.compat
        if compat is None:
            c, e = self.scale(name)
            return np.ldexp((c * self.expand(name)).astype(np.float32), e)
        from kilodelta.exact import ordered

        target, q = self.target(name), self.coefficients(name)
        left = compat.left(q, target, self.stream, range(target.matrix[0]))
        product = ordered.multiplier(compat.right(q, target, self.stream))(left)
        return (product * compat.scaling).astype(np.float32)

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write the file, in full or not at all; returns its bytes.

        Raises:
            OutputError: it cannot be written there.
            InputError: the manifest outgrows the format's header.
        """
        from kilodelta.format import file

        return file.write(self, Path(path))


def _check_binding(delta: Delta) -> None:
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
