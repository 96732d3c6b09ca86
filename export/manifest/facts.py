"""Describe exported artefacts as data: no file, no JSON, no heavy import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from kilodelta.files.dtypes import PRECISIONS

DTYPES = tuple(PRECISIONS)
"""Precisions that models are exported in."""
FLAVOURS = ("tensorrt", "tensorrt_rtx")
POINTS = ("min", "opt", "max")
BATCH, SEQUENCE = "batch", "sequence"
PAST_SEQUENCE = "past_sequence"
"""Names of axes that vary: rows, and tokens of the main input."""

Sizes: TypeAlias = tuple[int, int, int]
"""The smallest, usual and largest size of an axis."""
Shape: TypeAlias = tuple[int, ...]
Profile: TypeAlias = Mapping[str, tuple[Shape, Shape, Shape]]
"""For each input its smallest, usual and largest shape."""


@dataclass(frozen=True, kw_only=True)
class Port:
    """An input or output: its name, dtype (`int64`, `float16`) and shape, an axis that varies by
    its name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class FileFact:
    """One file: its name in the manifest's folder, `sha256:<hex>` of its bytes, their number."""

    file: str
    sha256: str
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """What only a TensorRT engine has."""

    flavour: Literal["tensorrt", "tensorrt_rtx"]
    version: str
    """TensorRT's own, such as `1.7.1.116`; an engine loads only there."""

    capabilities: tuple[str, ...]
    """GPUs it runs on, such as `("sm86", "sm89")`."""

    tf32: bool
    """Whether float32 products may be taken in TF32."""

    refittable: tuple[str, ...]
    """Weights that can be exchanged, by name; empty where none can."""

    onnx: str
    """The digest of the ONNX file it was built from, which may not have been kept."""


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """One exported model; `files` are its own file first, then external data."""

    kind: Literal["onnx", "engine"]
    dtype: Literal["float32", "float16", "bfloat16"]
    files: tuple[FileFact, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    profile: Profile
    """The shapes an engine takes; for ONNX, which takes any, those it is meant to be used at."""

    engine: EngineFacts | None = None

    @property
    def file(self) -> str:
        """The name of its own file."""
        return self.files[0].file


@dataclass(frozen=True, kw_only=True)
class DeltaFacts:
    """The `.kd` file: its name, digest and bytes, and its method with all options."""

    file: FileFact
    method: Mapping[str, str | int | float]


@dataclass(frozen=True, kw_only=True)
class ExportManifest:
    """All that is known about the artefacts of one folder."""

    tool: str
    libraries: Mapping[str, str]
    base_name: str
    base_root: str
    delta: DeltaFacts
    result_root: str
    """The proved root over the merged targets, as in the `.kd` file."""

    extras: tuple[str, ...]
    model: str | None
    """`package.module:function` that built the module, where one was given."""

    artefacts: tuple[Artefact, ...]


def misfit(points: tuple[Shape, Shape, Shape], port: Port) -> str:
    """Say what is wrong with an input's smallest, usual and largest shape; empty if nothing.

    Example:
        >>> misfit(((1,), (8,), (4,)), Port(name="x", dtype="float32", shape=("batch",)))
        '1, 8, 4 do not rise from 1 on'
    """
    if any(len(point) != len(port.shape) for point in points):
        return f"its shapes have not the {len(port.shape)} axes of {port.name}"
    for extent, low, usual, high in zip(port.shape, *points, strict=True):
        least = 0 if extent == PAST_SEQUENCE else 1  # a prompt comes with an empty cache
        if not least <= low <= usual <= high:
            return f"{low}, {usual}, {high} do not rise from {least} on"
        if isinstance(extent, int) and (low, high) != (extent, extent):
            return f"an axis of {port.name} is {extent} and cannot be {low} to {high}"
    return ""
