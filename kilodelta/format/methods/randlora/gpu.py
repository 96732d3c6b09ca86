"""RandLoRA's factors drawn on a GPU.

Source: Albert et al., https://arxiv.org/abs/2502.00987
"""

from __future__ import annotations

from kilodelta.format.methods.randlora.spec import ROLE_A, ROLE_B, RandLora
from kilodelta.merging.gpu.sides import Drawing, Sides


def draws(method: RandLora, drawing: Drawing) -> Sides:
    """Draw the B_j with lambda folded in, and A with gamma; transposed where out < in."""
    q, unit = drawing.q, drawing.unit
    large = unit.large(drawing.rows(ROLE_B), q["lambda"], method.sparsity)
    small = unit.small(drawing.columns(ROLE_A), q["gamma"], method.rank, method.sparsity)
    out, in_ = drawing.target.matrix
    return Sides(out=small, in_=large) if out < in_ else Sides(out=large, in_=small)
