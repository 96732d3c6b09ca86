"""VeRA's factors drawn on a GPU.

Source: Kopiczko et al., https://arxiv.org/abs/2310.11454
"""

from __future__ import annotations

import numpy as np

from kilodelta.format.methods.vera.spec import ROLE_A, ROLE_B, Vera
from kilodelta.merging.gpu.sides import Drawing, Sides


def draws(method: Vera, drawing: Drawing) -> Sides:
    """Draw diag(b) B diag(lambda), and A."""
    q, unit = drawing.q, drawing.unit
    ones = np.ones(method.rank, np.int8), np.ones(drawing.target.matrix[1], np.int8)
    return Sides(
        out=unit.signed(drawing.rows(ROLE_B), q["lambda"], q["b"]),
        in_=unit.signed(drawing.columns(ROLE_A), *ones),
    )
