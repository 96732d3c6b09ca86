"""A delta: one fine-tune of one base, as the file holds it and as exact integer updates."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kilodelta.errors import BaseMismatchError, InputError
from kilodelta.exact import products
from kilodelta.exact.bases import Stream
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.tensor import GRID, RawTensor, TensorInfo
from kilodelta.format import container, cost
from kilodelta.format.blob import Blob
from kilodelta.format.fit import check_fit
from kilodelta.format.form import Form
from kilodelta.format.grid_names import named_for
from kilodelta.format.manifest import Manifest
from kilodelta.format.methods import Method
from kilodelta.format.packing import Ints
from kilodelta.format.targets import Target, by_tensor, select
from kilodelta.grid.model import QuantisedModel
from kilodelta.grid.open import is_quantised, open_quantised


@dataclass(frozen=True, kw_only=True)
class IntegerFactors:
    """One target's update 2^e * (c * left @ right), (out, in); all letters are integers."""

    left: Ints
    """(out, K)."""
    right: Ints
    """(K, in)."""
    c: int
    e: int


@dataclass(frozen=True, kw_only=True, repr=False)
class Delta:
    """A fine-tune: the manifest, the packed coefficients, the tensors stored whole.

    A delta that was read alone knows its coefficients but not its targets' shapes; `bind` it to
    the base before asking for updates.

    Example:
        >>> import kilodelta
        >>> golden = "tests/golden/0.1.0"
        >>> delta = kilodelta.load(f"{golden}/nola-8.kd", base=f"{golden}/base.safetensors")
        >>> delta
        Delta(nola: rank 2, bases 131, basis sign; 8 bits, seed 81985529216486895)
          base:    golden sha256:9f1dd3248b11…
          tensors: 4 (*.weight) in 1048 bytes of coefficients, 1 stored whole
        >>> delta.expand("tall.weight").dtype
        dtype('int64')
    """

    manifest: Manifest
    blob: npt.NDArray[np.uint8]
    """The packed coefficients, uint8 (bytes,)."""
    extras: Mapping[str, RawTensor] = field(default_factory=dict)
    probes: Mapping[str, RawTensor] = field(default_factory=dict)
    layout: tuple[Target, ...] | None = None
    """The targets in the base, where the delta is bound to one."""
    max_work: float | None = None
    """The most operations that its expansion may take (`kilodelta.format.cost`); None: as many as
    suit the size of the base."""

    @property
    def method(self) -> Method:
        """The exact method.

        Raises:
            InputError: the file is a compatibility form; it can be merged, proved and inspected.
        """
        method = self.manifest.method
        if not isinstance(method, Method):
            raise InputError(
                f"{method.name} is a compatibility form: its basis is of floats, so it has no exact"
                " integer update",
                fix="kilodelta merge takes it as it is; for the rest import it with --requantise",
            )
        return method

    @property
    def form(self) -> Form:
        """The method, exact or not: what both have in common."""
        return self.manifest.method

    @property
    def stream(self) -> Stream:
        """The random bases of the file's seed."""
        return Stream(self.manifest.seed)

    def bind(self, base: str | os.PathLike[str] | Checkpoint | QuantisedModel) -> Delta:
        """Return the same delta with its targets located in a base.

        Only shapes and counts are checked here; `kilodelta.verify` and `kilodelta.merge` check the
        base's digest.

        Raises:
            BaseMismatchError: the targets or the coefficients do not fit the base.
            FileError: the coefficients break the exactness bound, or their expansion would take
                more work than allowed.
        """
        if self.manifest.grid is not None:
            return self.bind_to(named_for(_quantised(base), self.manifest).infos())
        if isinstance(base, QuantisedModel):
            return self.bind_to(base.infos())
        checkpoint = Checkpoint.open(base)
        return self.bind_to(checkpoint.info(name) for name in checkpoint.names)

    def bind_to(self, tensors: Iterable[TensorInfo]) -> Delta:
        """Do what `bind` does for a base of which only the tensors' shapes are at hand.

        Args:
            tensors: all tensors of the base.

        Raises:
            BaseMismatchError, FileError: as `bind`.
        """
        bound = replace(self, layout=select(tensors, self.manifest.patterns))
        check_fit(bound._packed, bound.extras)
        cost.check(bound.form, bound._packed.targets, bound.max_work)
        return bound

    @property
    def grid_targets(self) -> tuple[str, ...]:
        """The names of the targets that the base stores quantised.

        Raises:
            InputError: the delta is not bound to a base.
        """
        return tuple(name for name, target in self.targets.items() if target.dtype == GRID)

    @cached_property
    def _packed(self) -> Blob:
        """The coefficients with their places in the blob.

        Raises:
            InputError: the delta is not bound to a base.
        """
        if self.layout is None:
            raise InputError(
                "this delta does not know its targets' shapes yet",
                fix="kilodelta.load(path, base=...), or delta.bind(base)",
            )
        return Blob(manifest=self.manifest, data=self.blob, targets=self.layout)

    @cached_property
    def targets(self) -> Mapping[str, Target]:
        """The targets by name, in target order; each matrix of a stack is one.

        Raises:
            InputError: the delta is not bound to a base.
        """
        return {target.name: target for target in self._packed.targets}

    @cached_property
    def tensors(self) -> Mapping[str, tuple[Target, ...]]:
        """The base's tensors that coefficients change, by name in target order, each with the
        targets that it holds: itself, or the matrices of a stack.

        Raises:
            InputError: the delta is not bound to a base.
        """
        return by_tensor(self._packed.targets)

    def target(self, name: str) -> Target:
        """Return one target.

        Raises:
            InputError: no target has that name, or the delta is not bound to a base.
        """
        if name not in self.targets:
            raise InputError(
                f"{name!r} is not a target of this delta", fix="its targets are in delta.targets"
            )
        return self.targets[name]

    def coefficients(self, name: str) -> Mapping[str, Ints]:
        """Read a target's coefficients by group, the shared groups among them.

        Returns:
            int8 or int16, each in its group's shape; float32 in a compatibility form.
        """
        return self._packed.of(self.target(name))

    def scale(self, name: str) -> tuple[int, int]:
        """Return (C, e) of a target: the product of its groups' c, the sum of their e."""
        return self._packed.scale(self.method, self.target(name))

    def bound(self, name: str) -> int:
        """Bound the magnitude of every sum in a target's dQ, from its coefficients alone."""
        return self.method.bound(self.coefficients(name))

    def factors(self, name: str) -> IntegerFactors:
        """Compute a target's update as two integer factors, (out, K) and (K, in)."""
        target, q = self.target(name), self.coefficients(name)
        c, e = self.scale(name)
        rows = range(target.matrix[0])
        return IntegerFactors(
            left=self.method.left(q, target, self.stream, rows),
            right=self.method.right(q, target, self.stream),
            c=c,
            e=e,
        )

    def expand(self, name: str) -> npt.NDArray[np.int64]:
        """Compute the exact integer update dQ of a target, int64 (out, in).

        The weights change by `2^e * C * dQ` with (C, e) from `scale`.

        Raises:
            InputError: no target has that name, or the delta is not bound, or not exact.

        Example:
            >>> from kilodelta.format.file import load
            >>> golden = "tests/golden/0.1.0"
            >>> delta = load(f"{golden}/nola-8.kd", base=f"{golden}/base.safetensors")
            >>> delta.expand("tall.weight").shape
            (11, 4)
        """
        factors = self.factors(name)
        return products.product(factors.left, factors.right, self.bound(name)).astype(np.int64)

    def update(self, name: str) -> npt.NDArray[np.float32]:
        """Compute what a merge adds to a target, float32 (out, in), before the weights' rounding.

        Raises:
            InputError: no target has that name, or the delta is not bound.
        """
        compat = self.manifest.compat
        if compat is None:
            c, e = self.scale(name)
            return np.ldexp((c * self.expand(name)).astype(np.float32), e)
        from kilodelta.exact import ordered  # numba, which only a compatibility form needs here

        target, q = self.target(name), self.coefficients(name)
        left = compat.left(q, target, self.stream, range(target.matrix[0]))
        product = ordered.multiplier(compat.right(q, target, self.stream))(left)
        return (product * compat.scaling).astype(np.float32)

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write the file, in full or not at all; return its bytes.

        Raises:
            OutputError: it cannot be written there.
            InputError: the manifest outgrows the format's header.
        """
        return container.write(Path(path), self.manifest, self._tensors)

    def file_size(self) -> int:
        """Return the bytes that `save` would write."""
        return container.size(self.manifest, self._tensors)

    @property
    def _tensors(self) -> container.Tensors:
        return container.named(self.blob, self.extras, self.probes)

    def __repr__(self) -> str:
        heading, *facts = self._facts()
        return "\n".join([f"Delta({heading[1]})", *(f"  {k + ':':<8} {v}" for k, v in facts)])

    def _repr_html_(self) -> str:
        rows = (f"<tr><th>{k}</th><td>{escape(v)}</td></tr>" for k, v in self._facts())
        return f"<table>{''.join(rows)}</table>"

    def _facts(self) -> list[tuple[str, str]]:
        """Return what a person wants to see first: names and values, short and printable."""
        manifest = self.manifest
        options = manifest.method.to_manifest()
        name = options.pop("name")
        said = ", ".join(f"{key} {value!s:.16}" for key, value in options.items())
        globs = _short(", ".join(manifest.patterns.include))
        whole = f", {len(self.extras)} stored whole" if self.extras else ""
        return [
            ("method", f"{name}: {said}; {manifest.bits} bits, seed {manifest.seed}"),
            ("base", f"{_short(manifest.base.name or 'unnamed')} {manifest.base.root[:19]}…"),
            (
                "tensors",
                f"{manifest.count} ({globs}) in {self.blob.size} bytes of coefficients{whole}",
            ),
        ]


def _quantised(base: str | os.PathLike[str] | Checkpoint | QuantisedModel) -> QuantisedModel:
    if not is_quantised(base):
        place = base.path if isinstance(base, Checkpoint) else base
        raise BaseMismatchError(
            f"the file was made for a quantised base, and {place} is none",
            fix="give the quantised model that it was made for",
        )
    return open_quantised(base)


def _short(text: str, width: int = 60) -> str:
    """Cut a text that a file brings, and leave out what a terminal would obey."""
    shown = "".join(c if c.isprintable() else "�" for c in text[: width + 1])
    return shown if len(text) <= width else shown[: width - 1] + "…"
