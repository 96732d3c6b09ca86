"""What `kilodelta export` is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from kilodelta.export.manifest.facts import Sizes
from kilodelta.export.tensorrt.flavour import AUTO

SHORT: Mapping[str, str] = MappingProxyType(
    {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
)
"""Precisions as file names and the command line write them."""


def short(dtype: str) -> str:
    """A precision as file names write it: `fp16` for `float16`."""
    return next(name for name, full in SHORT.items() if full == dtype)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to export, and how."""

    onnx: bool = True
    """Keep the ONNX files; engines are built from them either way."""

    capabilities: tuple[str, ...] = ()
    """GPUs to build an engine for, such as `("sm86", "sm89")`; none by default."""

    dtypes: tuple[str, ...] = ("float32",)
    external: bool = False
    """Put weights beside the ONNX file; above 2 GB they are there anyway."""

    flavour: str = AUTO
    sizes: Mapping[str, Sizes] = field(default_factory=dict)
    """Smallest, usual and largest size of axes, by name; the others' follow from the model."""

    tf32: bool = False
    refittable: bool = False
    """Let the delta's tensors be exchanged in the engine later."""

    model: str | None = None
    config: str | None = None
    inputs: str | None = None
    """A batch to trace with, where the model does not say what its inputs look like."""

    force: bool = False
