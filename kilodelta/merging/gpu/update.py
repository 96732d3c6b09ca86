"""One target's update on a device: any box of its weights, merged bit for bit as on a CPU."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from kilodelta.format.delta import Delta
from kilodelta.format.targets import Target
from kilodelta.merging.gpu.sides import sides
from kilodelta.merging.gpu.unit import Draw, Step, Unit


class Update:
    """A bound delta's update of one target; coordinates let every part be made alone."""

    def __init__(self, delta: Delta, target: Target, unit: Unit) -> None:
        self._delta, self._target, self._unit = delta, target, unit
        self._q = delta.coefficients(target.name)
        self._columns: tuple[range, Tensor] | None = None

    @cached_property
    def step(self) -> Step:
        c, e = self._delta.scale(self._target.name)
        return Step(c=c, e=e, bound=self._delta.method.bound(self._q))

    @cached_property
    def _draws(self) -> tuple[Draw, Draw]:
        """Of the rows, of the columns, of the tensor as it is stored."""
        delta, target = self._delta, self._target
        found = sides(delta.method, self._q, target, delta.stream, self._unit)
        return found.stored(target)

    def prepare(self, columns: range) -> Tensor:
        """The factor of the columns, kept until others are asked for."""
        if self._columns is None or self._columns[0] != columns:
            self._columns = columns, self._draws[1](columns)
        return self._columns[1]

    def merge(self, weights: Tensor, rows: range, columns: range) -> tuple[Tensor, Tensor]:
        """New weights of a box of the stored matrix, and a flag (1,), not zero where one of them
        is not finite.

        Args:
            weights: contiguous (rows, columns) on the unit's device, left as they are.
        """
        right = self.prepare(columns)
        return self._unit.add(weights, self._draws[0](rows), right, self.step)
