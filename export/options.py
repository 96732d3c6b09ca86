"""What `kilodelta export` is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from kilodelta.errors import InputError
from kilodelta.export.manifest.facts import Sizes
from kilodelta.export.tensorrt.flavour import AUTO
from kilodelta.files.dtypes import PRECISIONS

SHORT: Mapping[str, str] = MappingProxyType({row.short: row.long for row in PRECISIONS.values()})
"""Precisions as file names and the command line write them."""


def short(dtype: str) -> str:
    """Return a precision as file names write it: `fp16` for `float16`."""
    return PRECISIONS[dtype].short


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

    outputs: tuple[str, ...] = ()
    """Names or globs of the outputs to export; by default all that the model declares."""

    max_work: float | None = None
    """The most operations that the file may ask for; by default what suits the base's size."""

    force: bool = False


_MOST = (1 << 31) - 1  # TensorRT counts in 32 bits where a shape is an index


def read_sizes(texts: Sequence[str]) -> dict[str, Sizes]:
    """Read sizes of axes as a user writes them: `batch=1,8,32`.

    Raises:
        InputError: a text of another form, or sizes that do not rise.

    Example:
        >>> read_sizes(["batch=1,8,32"])
        {'batch': (1, 8, 32)}
    """
    found: dict[str, Sizes] = {}
    for text in texts:
        name, _, numbers = text.partition("=")
        sizes = tuple(int(n) if n.isdecimal() else 0 for n in numbers.split(","))
        rises = len(sizes) == 3 and 1 <= sizes[0] <= sizes[1] <= sizes[2] <= _MOST
        if not rises or name in found:
            raise InputError(
                f"{text!r} is no profile of an axis",
                fix="give each axis once, as in batch=1,8,32: smallest, usual, largest",
            )
        found[name] = (sizes[0], sizes[1], sizes[2])
    return found
