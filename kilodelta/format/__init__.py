"""Say what a `.kd` file holds: manifest, methods, coefficients, and the delta that they make.

The contract is `docs/format.md`; this package is that document in code, and needs no torch but for
the parts of `methods/` that the rooms above load. `container.py` is the file as bytes,
`manifest.py` what it says about itself, `delta.py` the fine-tune; `foreign/` holds other tools'
float bases.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kilodelta.lazy import lazy

if TYPE_CHECKING:
    from kilodelta.format.delta import Delta as Delta
    from kilodelta.format.file import load as load
    from kilodelta.format.methods import METHODS as METHODS
    from kilodelta.format.methods import Method as Method
    from kilodelta.format.methods import register as register
    from kilodelta.format.targets import Patterns as Patterns

_WHERE = {
    "Delta": "kilodelta.format.delta",
    "METHODS": "kilodelta.format.methods",
    "Method": "kilodelta.format.methods",
    "Patterns": "kilodelta.format.targets",
    "load": "kilodelta.format.file",
    "register": "kilodelta.format.methods",
}

__all__ = ["METHODS", "Delta", "Method", "Patterns", "load", "register"]

__getattr__, __dir__ = lazy(__name__, _WHERE)
