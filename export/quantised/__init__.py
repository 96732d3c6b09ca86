"""Export a model that was merged in the grid of its quantised base, its codes kept.

The graph is the float one, traced as ever; then each quantised weight becomes the constants of
`MatMulNBits` or `DequantizeLinear` (`graph.py`), packed as those operators want them
(`constants.py`), and is read back from the file that was written (`proof.py`). `engines.py` says
what TensorRT builds of which grid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kilodelta.lazy import lazy

if TYPE_CHECKING:
    from kilodelta.export.quantised.engines import require_engine as require_engine
    from kilodelta.export.quantised.graph import put_codes as put_codes
    from kilodelta.export.quantised.proof import prove_codes as prove_codes

_WHERE = {
    "prove_codes": "kilodelta.export.quantised.proof",
    "put_codes": "kilodelta.export.quantised.graph",
    "require_engine": "kilodelta.export.quantised.engines",
}

__all__ = ["prove_codes", "put_codes", "require_engine"]

__getattr__, __dir__ = lazy(__name__, _WHERE)
