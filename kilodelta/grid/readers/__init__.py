"""One reader for each `quant_method`: from a module's tensors to its quantised weight.

A reader says in which layout a weight lies; it reads no number of it but a stored shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from kilodelta.grid.model import Stored
from kilodelta.grid.readers.common import Module
from kilodelta.grid.readers.compressed_tensors import read_compressed_tensors
from kilodelta.grid.readers.fp8 import read_fp8
from kilodelta.grid.readers.gptq import read_awq, read_gptq
from kilodelta.grid.readers.modelopt import read_modelopt

Reader = Callable[[Module], Stored | None]
READERS: Mapping[str, Reader] = MappingProxyType(
    {
        "compressed-tensors": read_compressed_tensors,
        "modelopt": read_modelopt,
        "fp8": read_fp8,
        "gptq": read_gptq,
        "awq": read_awq,
    }
)
"""By `quant_method`: from a module's tensors to its quantised weight, None where it has none."""
