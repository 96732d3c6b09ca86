"""Uni-LoRA's factors drawn on a GPU.

Source: Li et al., https://arxiv.org/abs/2506.00799
"""

from __future__ import annotations

from kilodelta.format.methods.unilora.spec import ROLE_S, ROLE_U, ROLE_V, UniLora
from kilodelta.merging.gpu.sides import Drawing, Sides


def draws(method: UniLora, drawing: Drawing) -> Sides:
    """Draw V, and U with the anchor's multiple of S."""
    theta, index, unit = drawing.q["theta"], drawing.target.index, drawing.unit
    return Sides(
        out=unit.picked(drawing.rows(ROLE_V), theta, index, method.rank),
        in_=unit.picked(
            drawing.columns(ROLE_U),
            theta,
            index,
            method.rank,
            anchor=method.anchor,
            anchor_role=ROLE_S,
        ),
    )
