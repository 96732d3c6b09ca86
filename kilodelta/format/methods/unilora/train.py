"""Uni-LoRA in torch: every factor is gathered from one vector that the whole model shares.

Source: Li et al., https://arxiv.org/abs/2506.00799
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import sqrt
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kilodelta.compress.training.factors import CoefficientValues, TrainableFactors, uniform
from kilodelta.compress.training.packed import PerDevice
from kilodelta.compress.training.precision import FixedOptions, Precision
from kilodelta.compress.training.quantise_ste import as_scale, round_group
from kilodelta.compress.training.trainables import GroupSet, Start
from kilodelta.compress.training.update import FactoredUpdate
from kilodelta.format.methods.base import Method
from kilodelta.format.methods.unilora.spec import LARGEST_ANCHOR, ROLE_S, ROLE_U, ROLE_V, UniLora
from kilodelta.format.quantise import scale_near
from kilodelta.format.targets import Target

UNIT = 2.0**-10
"""The step of which the anchor is a multiple before theta has a scale."""
SMALL = 0.02
"""Largest entry of theta at the start without an anchor, as in the paper's code."""
WIDE = 0.1
"""The same where updates begin with a given size. Theta is then large beside the steps of training,
so that an update changes in proportion to them and not with their square."""


class UniLoraFactors(TrainableFactors):
    """update = size V (a S + U), U (r, in) and V (out, r) signed picks from theta.

    Until quantised training begins, the anchor is counted in steps of `UNIT`. Then `settle` fixes
    theta's scale, and chooses the integer that keeps the anchor's size.
    """

    settled: ClassVar[FixedOptions] = FixedOptions(options=("anchor",), groups=("theta",))
    method: UniLora

    def __init__(self, method: Method, seed: int, targets: Sequence[Target]) -> None:
        super().__init__(method, seed, targets)
        self._picks = PerDevice(self._draw_picks)
        self._S = PerDevice(self._draw_S)
        rank = self.method.rank
        sizes = [rank * side for target in targets for side in target.matrix]
        self._sizes = sizes

    def _draw_S(self) -> Tensor:  # noqa: N802
        """Draw S, float32 (r, in)."""
        width = max(target.matrix[1] for target in self.targets)
        drawn = self.stream.sign(ROLE_S, 0, range(self.method.rank), range(width))
        return torch.from_numpy(drawn).float()

    def _draw_picks(self) -> Tensor:
        """Draw where each entry of V^T (r, out) and U (r, in) of each target comes from.

        Returns:
            int32 indices into theta followed by -theta, the targets one after the other.
        """
        return torch.cat([part for target in self.targets for part in self._picks_of(target)])

    def _picks_of(self, target: Target) -> tuple[Tensor, Tensor]:
        out, in_ = target.matrix
        k, ranks = self.method.bases, range(self.method.rank)
        marks = np.arange(1, k + 1, dtype=np.int32)  # theta's own indices, made signed by `pick`
        V = self.stream.pick(ROLE_V, target.index, marks, range(out), ranks)
        U = self.stream.pick(ROLE_U, target.index, marks, ranks, range(in_))
        both = np.ascontiguousarray(V.T), U
        V_at, U_at = (np.where(p > 0, p - 1, k - p - 1).astype(np.int32).reshape(-1) for p in both)
        return torch.from_numpy(V_at), torch.from_numpy(U_at)

    @property
    def constants(self) -> Sequence[PerDevice]:
        return (self._picks, self._S) if self.method.anchor else (self._picks,)

    def start_shared(self, generator: torch.Generator) -> Mapping[str, Start]:
        """Start theta at zero beside an anchor, else small."""
        k = self.method.bases
        theta = torch.zeros(k) if self.method.anchor else uniform(generator, (k,), SMALL)
        return {"theta": Start(values=theta)}

    def start(self, target: Target, generator: torch.Generator) -> Mapping[str, Start]:
        """Start with the size that makes the anchor as large as LoRA's A."""
        anchor = abs(self.method.anchor) * UNIT
        size = 1 / (anchor * sqrt(3 * target.matrix[1])) if anchor else 1.0
        return {"size": Start(values=torch.zeros(()), gain=size)}

    def start_wide(self, shared: GroupSet, own: Sequence[GroupSet], sizes: Sequence[float]) -> bool:
        if self.method.anchor:  # beside it, theta begins at zero
            return False
        values = CoefficientValues(shared=shared, own=own, precision=None)
        with torch.no_grad():
            shared.get_parameter("theta").mul_(WIDE / SMALL)
            prepared = self.prepare(values)
            for index, (groups, size) in enumerate(zip(own, sizes, strict=True)):
                present = self.update(prepared, values, index).matrix().pow(2).mean().sqrt()
                groups.gains = {**groups.gains, "size": size / present.item()}
        return True

    def prepare(self, values: CoefficientValues) -> tuple[Tensor, ...]:
        """Gather all factors at once: one flat tensor, and a view of it per factor.

        Split as a whole, because the gradient of a slice taken alone is a tensor as long as all
        factors together, once per factor.
        """
        theta = values.of_file("theta")
        gathered = torch.cat((theta, -theta)).index_select(0, self._picks.on(theta.device))
        return gathered, *torch.split(gathered, self._sizes)

    def update(
        self, prepared: tuple[Tensor, ...], values: CoefficientValues, index: int
    ) -> FactoredUpdate:
        out, in_ = self.targets[index].matrix
        V, U = prepared[1 + 2 * index].view(-1, out), prepared[2 + 2 * index].view(-1, in_)
        if self.method.anchor:
            U = torch.add(U, self._S.on(U.device)[:, :in_], alpha=self._anchor(values))
        return FactoredUpdate(left=V.t(), right=(U * values.of(index, "size")).t())

    def _anchor(self, values: CoefficientValues) -> float:
        """Return the anchor as a number of the size of theta's."""
        if values.precision is None:
            return float(self.method.anchor * UNIT)
        file_method: Any = values.precision.method
        return float(file_method.anchor * values.precision.fixed["theta"].value)

    def widest(self) -> Method:
        """Allow for any anchor: it is chosen only after the mantissas."""
        return replace(self.method, anchor=LARGEST_ANCHOR)

    def settle(self, shared: GroupSet, precision: Precision) -> Precision:
        """Fix theta's scale, and the anchor as the nearest whole number of its steps."""
        size = self.method.anchor * UNIT
        if not size:
            return precision
        rounded = round_group(shared.exact("theta"), precision.bits, precision.c_max)
        step = as_scale(rounded.c, rounded.e).value if bool(rounded.q.any()) else UNIT
        steps = min(max(1, round(abs(size) / step)), LARGEST_ANCHOR)
        return replace(
            precision,
            method=replace(self.method, anchor=steps if size > 0 else -steps),
            fixed={"theta": scale_near(abs(size) / steps, precision.c_max)},
        )
