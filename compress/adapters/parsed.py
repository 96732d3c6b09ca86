"""What a source makes of an adapter: everything that a `.kd` file needs but its proof."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from kilodelta.format.quantise import Floats
from kilodelta.merging.build import Numbers, Recipe

Values = Mapping[str, Mapping[str, Numbers]]


@dataclass(frozen=True, kw_only=True)
class Draft:
    """An imported adapter before it is bound to its base and proved."""

    source: str
    """What it was, for the report: `PEFT LoRA`, `official NOLA`."""
    recipe: Recipe
    own: Values
    """Coefficients by target name, then by group name."""
    shared: Mapping[str, Numbers] = field(default_factory=dict)
    """The groups that the whole file has once."""
    wanted: Callable[[str], Floats]
    """A target's name to the update that the other tool makes, float64 (out, in)."""
    notes: tuple[str, ...] = ()
    """What a user should know of this import, each a sentence."""
