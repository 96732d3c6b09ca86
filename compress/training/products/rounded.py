"""Multiply float32 rows with frozen float32 weights, both rounded to a narrower type.

`Bfloat16` rounds each number; sums are float32. `Int8` rounds the numbers of a row to the integers
from -127 to 127 with a common factor, those of an activation or a gradient by its own row and those
of a weight by what a sum runs along; sums are exact. That is how 8-bit matrix products train with
the gradient of the weights left out (SwitchBack, arXiv 2304.13013), which a frozen weight has not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

FLOAT32 = "float32"
"""The type in which a layer multiplies by itself."""
INT8 = "int8"
LARGEST = 127
"""The largest 8-bit code; -128 is left out, so that codes are symmetric."""
LONGEST = (2**31 - 1) // LARGEST**2
"""The most products whose sum a 32-bit integer holds, whatever the codes."""
_SMALLEST = 1e-30
"""The smallest row maximum that is told from 0: its inverse is a float32."""
_WHOLE = 1.5 * 2.0**23
"""Added to a float32 of less than 2^22 it leaves the nearest integer in the lowest bits."""


class Products(ABC):
    """How rows and a frozen weight multiply: `y = x W^T`, and for the gradient `g W`."""

    name: str
    """The type that both are rounded to."""
    longest: int | None = None
    """The longest sum that the type holds; None for any."""

    @staticmethod
    def held_bytes(weight: Tensor) -> int:
        """Say what is held of a weight between products, in bytes."""
        return 0

    def hold(self, weight: Tensor) -> None:  # noqa: B027  (most types hold nothing)
        """Prepare what is held of a weight, before it is needed."""

    @abstractmethod
    def rounded(self, rows: Tensor) -> Any:
        """Round float32 rows (n, k), once for all weights that they are multiplied with."""

    @abstractmethod
    def forward(self, rows: Any, weight: Tensor) -> Tensor:
        """Multiply rounded rows (n, in) with a weight (out, in): float32 (n, out)."""

    @abstractmethod
    def backward(self, rows: Any, weight: Tensor) -> Tensor:
        """Multiply rounded gradients (n, out) with a weight (out, in): float32 (n, in)."""


class Bfloat16(Products):
    """A weight's narrow copy does not outlive a product."""

    name = "bfloat16"

    def rounded(self, rows: Tensor) -> Tensor:
        return rows.bfloat16()

    def forward(self, rows: Tensor, weight: Tensor) -> Tensor:
        return linear(rows, weight.bfloat16()).float()

    def backward(self, rows: Tensor, weight: Tensor) -> Tensor:
        return (rows @ weight.bfloat16()).float()


@dataclass(frozen=True, eq=False)
class Coded:
    """Rows as integers: codes times scales is nearly what they were."""

    codes: Tensor
    """int8 (n, k)."""
    scales: Tensor
    """float32 (n, 1)."""


@dataclass(frozen=True, eq=False)
class _Weight:
    """A weight's codes for one direction."""

    codes: Tensor
    """int8 (k, m): what rows (n, k) are multiplied with."""
    scales: Tensor
    """float32 (m,)."""


class Int8(Products):
    """A weight is coded once for either direction: two bytes beside its four.

    Values that take its parameter's place for a while (a way of `Ways`) have codes of their own.
    """

    name = INT8
    longest = LONGEST

    def __init__(self) -> None:
        self._weights: dict[tuple[int, int, bool], _Weight] = {}

    @staticmethod
    def held_bytes(weight: Tensor) -> int:
        return 2 * weight.numel()

    def hold(self, weight: Tensor) -> None:
        for back in (False, True):
            self._coded(weight, back=back)

    def rounded(self, rows: Tensor) -> Coded:
        """Round rows to codes; of a row that is not finite, all results are NaN.

        Example:
            >>> coded = Int8().rounded(torch.tensor([[1.0, -2.0, 0.25], [0.0, 0.0, 0.0]]))
            >>> coded.codes.tolist()
            [[64, -127, 16], [0, 0, 0]]
        """
        # Two passes that write nothing take half the time of one over absolute values.
        largest = torch.maximum(rows.amax(1, keepdim=True), rows.amin(1, keepdim=True).neg_())
        largest.clamp_(min=_SMALLEST)
        # The sum's lowest byte is the nearest integer, in two's complement (ties to even).
        whole = torch.addcmul(rows.new_tensor(_WHOLE), rows, LARGEST / largest)
        return Coded(_laid_out(whole.view(torch.int32)), largest.mul_(1 / LARGEST))

    def forward(self, rows: Coded, weight: Tensor) -> Tensor:
        return self._product(rows, self._coded(weight, back=False))

    def backward(self, rows: Coded, weight: Tensor) -> Tensor:
        return self._product(rows, self._coded(weight, back=True))

    def _product(self, rows: Coded, weight: _Weight) -> Tensor:
        sums = torch._int_mm(rows.codes, weight.codes)
        return sums.float().mul_(rows.scales).mul_(weight.scales)

    def _coded(self, weight: Tensor, *, back: bool) -> _Weight:
        key = weight.data_ptr(), weight._version, back
        found = self._weights.get(key)
        if found is None:
            coded = self.rounded(weight.detach().t() if back else weight.detach())
            codes = coded.codes.t()
            if 1 in codes.shape:
                codes = _laid_out(codes)
            found = self._weights[key] = _Weight(codes, coded.scales.squeeze(1))
        return found


def _laid_out(codes: Tensor) -> Tensor:
    """Copy codes into new memory, int8, row after row.

    The stride of an axis of length 1 may be any number, also in a tensor that calls itself
    contiguous. oneDNN believes it, and torch does not hear that it has refused to multiply
    (https://github.com/pytorch/pytorch/pull/194682).
    """
    return torch.empty(codes.shape, dtype=torch.int8, device=codes.device).copy_(codes)


PRODUCTS: dict[str, type[Products]] = {each.name: each for each in (Bfloat16, Int8)}
