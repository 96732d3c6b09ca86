"""Describe a quantised base without its numbers: enough to know it, and to bind a file to it.

A device holds this beside a graph of the base. The roots say which files are for it: those made for
the same numbers in any layout (docs/format.md, section 10).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kilodelta.files import untrusted
from kilodelta.files.identity import of_digests
from kilodelta.files.tensor import GRID, TensorInfo
from kilodelta.files.untrusted import FieldError
from kilodelta.format.manifest import Grid, Manifest, grid_to_json, parse_grid
from kilodelta.grid.matrix import Shape
from kilodelta.grid.model import LogicalIdentity, QuantisedModel
from kilodelta.merging.quantised import grid_of, require_same_numbers


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A quantised base without its numbers.

    Attributes:
        grid: its roots, as a manifest states them.
        shapes: (out, in) of every quantised weight, in name order.
        digests: the weights' logical digests; `grid.logical` is over them.
        plain: the names of the stored tensors that are no part of a quantised weight.
    """

    grid: Grid
    shapes: Mapping[str, Shape]
    digests: Mapping[str, str]
    plain: tuple[str, ...]

    def infos(self, stored: Mapping[str, TensorInfo]) -> tuple[TensorInfo, ...]:
        """List what a delta may change, as `QuantisedModel.infos` does.

        Args:
            stored: the base's stored tensors by name.
        """
        weights = (
            TensorInfo(name=name, dtype=GRID, shape=shape) for name, shape in self.shapes.items()
        )
        return (*weights, *(stored[name] for name in self.plain))

    def require(self, manifest: Manifest, where: str) -> None:
        """Check that a file was made for this base, in any layout.

        Args:
            manifest: the file's.
            where: what holds the base, for the message.

        Raises:
            BaseMismatchError: it was made for a float model, or for another quantised one.
        """
        require_same_numbers(self.grid, manifest, where)


def outline_of(model: QuantisedModel, identity: LogicalIdentity) -> Outline:
    """Describe a quantised model, of which the identity has been computed."""
    return Outline(
        grid=grid_of(identity),
        shapes={name: stored.shape for name, stored in model.stored.items()},
        digests=dict(identity.weights),
        plain=model.plain,
    )


def outline_to_json(outline: Outline) -> dict[str, Any]:
    """Return what `parse_outline` reads."""
    weights = {name: [*shape, outline.digests[name]] for name, shape in outline.shapes.items()}
    return {
        "grid": grid_to_json(outline.grid),
        "weights": weights,
        "plain": list(outline.plain),
    }


def parse_outline(value: Any, stored: Mapping[str, TensorInfo]) -> Outline:
    """Check an outline from JSON: its logical root has to follow from the weights' digests.

    Args:
        value: the parsed JSON.
        stored: the base's stored tensors by name.

    Raises:
        FieldError: names the field that is wrong.
    """
    given = untrusted.table(value, "quantised", ("grid", "weights", "plain"))
    grid = parse_grid(given["grid"])
    rows = untrusted.mapping(given["weights"], "weights")
    weights = {name: _weight(row, f"weights.{name:.80}") for name, row in rows.items()}
    identity = of_digests({name: digest for name, (_, digest) in weights.items()})
    if identity.root != grid.logical:
        raise FieldError("grid.logical is not the root of the weights' digests")
    plain = untrusted.texts(given["plain"], "plain")
    if unknown := sorted(set(plain) - stored.keys()):
        raise FieldError(f"plain names {unknown[0]!r:.80}, which the base does not have")
    if doubled := sorted(set(plain) & weights.keys()):
        raise FieldError(f"{doubled[0]!r:.80} is plain and quantised")
    return Outline(
        grid=grid,
        shapes={name: weights[name][0] for name in identity.tensors},
        digests=identity.tensors,
        plain=plain,
    )


def _weight(value: Any, where: str) -> tuple[Shape, str]:
    if not isinstance(value, list) or len(value) != 3:
        raise FieldError(f"{where} is not [rows, columns, digest]")
    rows, columns = untrusted.shape(value[:2], where)
    return (rows, columns), untrusted.digest(value[2], where)
