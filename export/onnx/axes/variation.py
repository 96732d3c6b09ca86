"""Describe what may vary in a batch: groups of axes with their sizes, and what is fixed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from kilodelta.export.manifest.facts import Sizes
from kilodelta.models import Batch

Place = tuple[str, int]
"""An input's name and the index of one of its axes."""


@dataclass(frozen=True, kw_only=True)
class AxisGroup:
    """Axes that vary together under one name.

    Attributes:
        name: of the axis, in the ONNX file and in profiles.
        places: where it occurs.
        given: its size in the batch that was shown.
        traced: its size while the graph is traced.
        sizes: smallest, usual and largest size to use it at; the model takes all three.
    """

    name: str
    places: tuple[Place, ...]
    given: int
    traced: int
    sizes: Sizes


@dataclass(frozen=True, kw_only=True)
class Variation:
    """What may vary in a batch, and what is fixed although one might expect otherwise."""

    batch: Batch
    groups: tuple[AxisGroup, ...]
    fixed: tuple[str, ...] = ()
    """Sentences."""

    def axes(self) -> dict[str, dict[int, str]]:
        """Return the names of the axes that vary, by input and index."""
        named: dict[str, dict[int, str]] = {name: {} for name in self.batch}
        for group in self.groups:
            for name, index in group.places:
                named[name][index] = group.name
        return named

    def group(self, name: str) -> AxisGroup:
        """Return the group of an axis's name."""
        return next(group for group in self.groups if group.name == name)

    def retraced(self, name: str, size: int) -> Variation:
        """Return the same with one axis traced at another size."""
        groups = (replace(g, traced=size) if g.name == name else g for g in self.groups)
        return replace(self, groups=tuple(groups))

    def fix(self, name: str, size: int, reason: str) -> Variation:
        """Return the same with one axis fixed at a size."""
        return Variation(
            batch=self.resized({name: size}),
            groups=tuple(group for group in self.groups if group.name != name),
            fixed=(*self.fixed, f"{name} is fixed at {size}: {reason}"),
        )

    def resized(self, sizes: Mapping[str, int]) -> Batch:
        """Return the batch with some of its axes, by name, at other sizes."""
        moved = {p: sizes[g.name] for g in self.groups if g.name in sizes for p in g.places}
        return resize(self.batch, moved)


def resize(batch: Batch, sizes: Mapping[Place, int]) -> Batch:
    """Cut axes, or repeat what they hold, to other sizes; every tensor is a new one."""
    made = {name: tensor.clone() for name, tensor in batch.items()}
    for (name, axis), size in sizes.items():
        index = torch.arange(size) % made[name].shape[axis]
        made[name] = made[name].index_select(axis, index)
    return made
