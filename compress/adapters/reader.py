"""What a reader of adapters is given, and what it returns: everything but the proof."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from kilodelta.format.quantise import Floats
from kilodelta.merging.build import Numbers, Recipe

Dtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What a user may say about reading an adapter.

    Attributes:
        bits: of an integer coefficient, for sources that become an exact method.
        dtype: the type in which a compatibility form keeps its coefficients.
        basis_dtype: the type in which another tool drew its basis, where its files do not say.
        alpha: official NOLA's alpha, by which its update is multiplied over the rank, where its
            files do not say.
        drawn_on: where official NOLA's bases were drawn; its files do not say.
        factors: a `.safetensors` file of official NOLA's factors, computed where its bases were
            drawn.
        name: what the base is called; its folder's name by default.
        prefix: where in the base the adapter's modules lie, if that is not clear: a module path to
            put before theirs, or `OLD=NEW` to replace a front.
    """

    bits: int = 8
    dtype: Literal["float32", "float16"] = "float32"
    basis_dtype: Dtype | None = None
    alpha: float | None = None
    drawn_on: Literal["cpu"] | None = None
    factors: str = ""
    name: str = ""
    prefix: str = ""

    @property
    def float_bits(self) -> int:
        """Bits of a compatibility form's coefficient."""
        return 32 if self.dtype == "float32" else 16


@dataclass(frozen=True, kw_only=True)
class ParsedAdapter:
    """An adapter before it is bound to its base and proved.

    Attributes:
        source: what it was, for the report: `PEFT LoRA`, `official NOLA`.
        recipe: what a delta is made of, before its coefficients.
        coefficients: by target name, then by group name.
        update: returns the update that the other tool makes to a target, float64 (out, in).
        shared: the groups that the whole file has once.
        notes: what a user should know of this import, each a sentence.
    """

    source: str
    recipe: Recipe
    coefficients: Mapping[str, Mapping[str, Numbers]]
    update: Callable[[str], Floats]
    shared: Mapping[str, Numbers] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
