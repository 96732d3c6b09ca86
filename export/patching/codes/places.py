"""Say where a file holds the codes, scales and zero points of a quantised weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kilodelta.export.patching.map import FilePlace
from kilodelta.grid.layouts import Layout
from kilodelta.grid.matrix import Shape

REST = ""
"""The file of a part that the model does not hold: it lies in the checkpoint of `write_rest`."""


@dataclass(frozen=True, kw_only=True)
class CodePlaces:
    """One copy of a quantised weight in a file.

    Attributes:
        layout: how its constants make the weight.
        block: rows and columns that share a step in the base, which the layout may have cut finer.
        parts: the constants by role; the dtype of codes below a byte is U8, of packed bytes.
    """

    layout: Layout
    block: Shape
    parts: Mapping[str, FilePlace]

    @property
    def codes(self) -> FilePlace:
        """Where the codes lie."""
        return self.parts[self.layout.codes_in]

    @property
    def is_held(self) -> bool:
        """Whether the model itself holds the codes, so that new ones are written there."""
        return self.codes.file != REST

    @property
    def needs_rest(self) -> bool:
        """Whether the model lacks a part, which is then read from the rest of the base."""
        return any(part.file == REST for part in self.parts.values())
