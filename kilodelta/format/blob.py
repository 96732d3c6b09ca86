"""Locate each target's coefficients and scales in a file, and read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import numpy.typing as npt

from kilodelta.format.foreign import stored
from kilodelta.format.manifest import FLOATS, Manifest
from kilodelta.format.methods import Method
from kilodelta.format.packing import Group, Ints, group_size, groups_size, unpack
from kilodelta.format.targets import Target


@dataclass(frozen=True, kw_only=True)
class Blob:
    """The packed groups of a file: the shared ones, then those of each target in target order."""

    manifest: Manifest
    data: npt.NDArray[np.uint8]
    """uint8 (bytes,)."""
    targets: tuple[Target, ...]

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        """The byte at which each target's groups begin, and the end of the last ones."""
        method, bits = self.manifest.method, self.manifest.bits
        position = groups_size(method.shared(), bits)
        starts = []
        for target in self.targets:
            starts.append(position)
            position += groups_size(method.groups(target), bits)
        return (*starts, position)

    @property
    def needed(self) -> int:
        """The bytes that these targets' coefficients take."""
        return self._starts[-1]

    @cached_property
    def _shared(self) -> dict[str, Ints]:
        return self._read(self.manifest.method.shared(), 0)

    def of(self, target: Target) -> Mapping[str, Ints]:
        """Read a target's coefficients by group, the shared groups among them.

        Returns:
            int8 or int16, each in its group's shape; float32 (and what a group's own type says) in
            a compatibility form.

        Raises:
            FileError: a coefficient is one that the format forbids.
        """
        groups = self.manifest.method.groups(target)
        return {**self._shared, **self._read(groups, self._starts[target.index])}

    def _read(self, groups: tuple[Group, ...], position: int) -> dict[str, Ints]:
        values = {}
        for group in groups:
            size = group_size(group, self.manifest.bits)
            data = self.data[position : position + size]
            values[group.name] = self._unpack(data, group).reshape(group.shape)
            position += size
        return values

    def _unpack(self, data: Ints, group: Group) -> Ints:
        if self.manifest.compat is None:
            return unpack(data, group.size, self.manifest.bits)
        return stored.unpack(data, group.dtype or FLOATS[self.manifest.bits])

    def scale(self, method: Method, target: Target) -> tuple[int, int]:
        """Return (C, e) of a target: the product of its groups' c, the sum of their e."""
        shared, own = method.shared(), method.groups(target)
        start = len(shared) + target.index * len(own)
        scales = self.manifest.scales
        by_group = {
            **dict(zip((group.name for group in shared), scales, strict=False)),
            **dict(zip((group.name for group in own), scales[start:], strict=False)),
        }
        chosen = [by_group[group] for group in method.scales()]
        return prod(scale.c for scale in chosen), sum(scale.e for scale in chosen)
