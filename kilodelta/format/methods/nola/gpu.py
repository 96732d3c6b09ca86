"""NOLA's factors drawn on a GPU.

Source: Koohpayegani et al., https://arxiv.org/abs/2310.02556
"""

from __future__ import annotations

import numpy as np
import torch

from kilodelta.exact.bases import Ints
from kilodelta.format.methods.base import magnitude
from kilodelta.format.methods.nola.spec import ROLE_A, ROLE_B, Nola
from kilodelta.merging.gpu.sides import Drawing, Sides
from kilodelta.merging.gpu.unit import Bases, Draw, Unit

MOST = 2**31 - 2**15
"""Where a group's magnitudes are cut: with one more number of 16 bits the sum is below 2^31."""


def draws(method: Nola, drawing: Drawing) -> Sides:
    """Draw (sum_j beta_j V_j) and (sum_i alpha_i U_i).

    Kernels accumulate in int32. If a factor may reach 2^31, its coefficients are split, and the
    parts concatenated along the rank, each beside a copy of the other factor:
    B (A1 + A2) = [B B] [A1; A2]. By the format's bound, 2^53, one of the two factors is whole.
    """
    out = _parts(drawing.rows(ROLE_B), drawing.q["beta"], method, drawing.unit)
    in_ = _parts(drawing.columns(ROLE_A), drawing.q["alpha"], method, drawing.unit)
    return Sides(out=_stacked(out, len(in_)), in_=_stacked(in_, len(out)))


def _parts(bases: Bases, q: Ints, method: Nola, unit: Unit) -> list[Draw]:
    """Split a factor into a sum of draws whose coefficients' magnitudes add up to below 2^31."""
    part = np.cumsum(magnitude(q)) // MOST
    split = (np.where(part == number, q, np.zeros_like(q)) for number in np.unique(part))
    return [unit.mixed(bases, q_part, method.rank) for q_part in split]


def _stacked(draws: list[Draw], times: int) -> Draw:
    """Put the parts of a factor one below the other, all of it so many times."""
    if len(draws) == times == 1:
        return draws[0]
    return lambda lines: torch.cat([draw(lines) for draw in draws]).repeat(times, 1)
