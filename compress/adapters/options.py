"""How to import an adapter; what is None is the source's own, or asked for when it is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Dtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a user may say about an import."""

    bits: int = 8
    """Bits of an integer coefficient, for sources that become an exact method."""
    dtype: Literal["float32", "float16"] = "float32"
    """The type in which a compatibility form keeps its coefficients."""
    basis_dtype: Dtype | None = None
    """The type in which another tool drew its basis, where its files do not say."""
    alpha: float | None = None
    """What official NOLA's update is multiplied by, over its rank, where its files do not say."""
    drawn_on: Literal["cpu"] | None = None
    """Where official NOLA's bases were drawn; its files do not say."""
    factors: str = ""
    """A .safetensors file of official NOLA's factors, computed where its bases were drawn."""
    name: str = ""
    """What the base is called; its folder's name by default."""
