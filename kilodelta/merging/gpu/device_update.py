"""One target's update on a device: any box of its weights, merged bit for bit as on a CPU."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from kilodelta.format.delta import Delta
from kilodelta.format.targets import Target
from kilodelta.merging.gpu.sides import sides
from kilodelta.merging.gpu.unit import Draw, Unit, UpdateScale


class DeviceUpdate:
    """A bound delta's update of one target; any part is made alone, by its coordinates."""

    def __init__(self, delta: Delta, target: Target, unit: Unit) -> None:
        self._delta, self._target, self._unit = delta, target, unit
        self._q = delta.coefficients(target.name)
        self._columns: tuple[range, Tensor] | None = None

    @cached_property
    def scale(self) -> UpdateScale:
        """What the product of the factors is multiplied by."""
        c, e = self._delta.scale(self._target.name)
        return UpdateScale(c=c, e=e, bound=self._delta.method.bound(self._q))

    @cached_property
    def _draws(self) -> tuple[Draw, Draw]:
        """The factors of the rows and of the columns of the tensor as it is stored."""
        delta, target = self._delta, self._target
        return sides(delta.method, self._q, target, delta.stream, self._unit).stored(target)

    def prepare(self, columns: range) -> Tensor:
        """Draw the factor of the columns, and keep it until others are asked for."""
        if self._columns is None or self._columns[0] != columns:
            self._columns = columns, self._draws[1](columns)
        return self._columns[1]

    def merge(self, weights: Tensor, rows: range, columns: range) -> tuple[Tensor, Tensor]:
        """Merge a box of the stored matrix.

        Args:
            weights: contiguous (rows, columns) on the unit's device, left as they are.
            rows, columns: where the box lies.

        Returns:
            New weights of its shape and type, and a flag (1,), not zero where one is not finite.
        """
        right = self.prepare(columns)
        return self._unit.add(weights, self._draws[0](rows), right, self.scale)
