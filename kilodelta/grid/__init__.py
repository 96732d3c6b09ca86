"""Read models whose weights are stored as codes and scales: exactly, in any known layout.

A quantised weight is a `Matrix` of small codes, steps and zero points; `layouts` holds one entry
per layout that says how stored tensors become one and how new codes are written back. The logical
root (`identity`) is the same for every layout of the same numbers. Nothing here needs torch.

Example:
    >>> from kilodelta.grid import is_quantised
    >>> is_quantised("tests/golden/0.1.0/base.safetensors")
    False
"""

from __future__ import annotations

from kilodelta.grid.matrix import Matrix as Matrix
from kilodelta.grid.model import LogicalIdentity as LogicalIdentity
from kilodelta.grid.model import QuantisedModel as QuantisedModel
from kilodelta.grid.open import is_quantised as is_quantised
from kilodelta.grid.open import open_quantised as open_quantised

__all__ = ["LogicalIdentity", "Matrix", "QuantisedModel", "is_quantised", "open_quantised"]
