"""Train through the file's rounding: integers with a scale c * 2^e, gradients straight through.

The rule is `kilodelta.format.quantise.quantise`, in torch, so that it runs inside a training
step on any device. A forward pass computes with q * c * 2^e, exactly what the file will hold; the
backward pass treats the rounding as the identity (straight-through estimator: Bengio et al.,
https://arxiv.org/abs/1308.3432).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kilodelta.format.packing import largest
from kilodelta.format.quantise import CLIPS, Scale


@dataclass(frozen=True)
class Rounded:
    """A group as the file will hold it: `q` float64 holding integers, `scale` = c * 2^e."""

    q: Tensor
    c: Tensor
    e: Tensor

    @property
    def value(self) -> Tensor:
        """q * c * 2^e as float32, which it is exactly: q and c take 23 bits together."""
        return (self.q * self.c * power_of_two(self.e)).float()


def power_of_two(e: Tensor) -> Tensor:
    """Compute 2^e as float64 from its bits, because no `pow` promises to be exact."""
    return ((e.long() + 1023) << 52).view(torch.float64)


def scale_above(step: Tensor, c_max: int) -> tuple[Tensor, Tensor]:
    """Find the smallest c * 2^e >= step > 0, c in (c_max / 2, c_max]; (1, 0) for a step of zero.

    Args:
        step: float64, any shape.
        c_max: the largest mantissa.

    Returns:
        c float64 and e int32, of step's shape.
    """
    # step / c_max = m 2^e with m in [1/2, 1): c = step 2^-e fits, and with e - 1 only at m = 1/2,
    # which the division may have rounded to.
    e = torch.frexp(step / c_max).exponent
    e = torch.where((step * power_of_two(1 - e)).ceil() <= c_max, e - 1, e).clamp(-128, 127)
    c = (step * power_of_two(-e)).ceil()
    empty = step <= 0
    return torch.where(empty, 1.0, c), torch.where(empty, 0, e)


def scale_near(value: Tensor, c_max: int) -> tuple[Tensor, Tensor]:
    """Find the c * 2^e nearest to a positive number; c and e as `scale_above` returns them."""
    c, e = scale_above(value, c_max)
    exact = value * power_of_two(-e)
    return torch.where((exact - (c - 1) < c - exact) & (c > 1), c - 1, c), e


def round_group(value: Tensor, bits: int, c_max: int) -> Rounded:
    """Round a group to integers with the scale of the least mean square error."""
    floats = value.detach().double()
    top = largest(bits)
    peak = floats.abs().max() / top
    if bits > 4:
        c, e = scale_above(peak, c_max)
        return round_with(value, bits, c, e)
    c, e = scale_above(peak * torch.tensor(CLIPS, dtype=peak.dtype, device=peak.device), c_max)
    steps = (c * power_of_two(e))[:, None]
    flat = floats.reshape(1, -1)
    errors = ((flat / steps).round().clamp(-top, top) * steps - flat).square().sum(dim=1)
    best = errors.argmin()
    return round_with(value, bits, c[best], e[best])


def round_with(value: Tensor, bits: int, c: Tensor, e: Tensor) -> Rounded:
    """Round a group to integers of a given scale.

    Args:
        value: the group, any shape.
        bits: of an integer.
        c, e: the scale, float64 and int32 of one element.
    """
    top = largest(bits)
    q = (value.detach().double() / (c * power_of_two(e))).round().clamp(-top, top)
    return Rounded(q, c, e)


def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    """Return `rounded`, bit for bit, whose gradient goes to `value` unchanged."""
    # The bracket is exactly zero, so the forward value is `rounded`, and its gradient one.
    return rounded.detach() + (value - value.detach())


def as_scale(c: Tensor, e: Tensor) -> Scale:
    """Return a scale as the file writes it."""
    return Scale(int(c.item()), int(e.item()))


def constants(scale: Scale, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a scale as tensors: c float64, e int32."""
    return (
        torch.tensor(float(scale.c), dtype=torch.float64, device=device),
        torch.tensor(scale.e, dtype=torch.int32, device=device),
    )
