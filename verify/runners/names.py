"""The names by which `--require` asks for runners."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from kilodelta.errors import InputError

RUNNERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "torch": ("torch-cpu", "torch-cuda"),
        "torch-cpu": ("torch-cpu",),
        "torch-cuda": ("torch-cuda",),
        "ort": ("onnxruntime-cpu", "onnxruntime-cuda"),
        "ort-cpu": ("onnxruntime-cpu",),
        "ort-cuda": ("onnxruntime-cuda",),
        "genai": ("onnxruntime-genai",),
        "tensorrt": ("tensorrt", "tensorrt-rtx"),
        "tensorrt-rtx": ("tensorrt-rtx",),
    }
)
"""By name, the runners any one of which satisfies the requirement."""


def check_names(names: Sequence[str]) -> None:
    """Check that every name is in `RUNNERS`.

    Raises:
        InputError: some are not; the fix lists those that are.
    """
    unknown = [name for name in names if name not in RUNNERS]
    if unknown:
        raise InputError(
            f"{', '.join(map(repr, unknown))} is no runner to require",
            fix=f"known are {', '.join(RUNNERS)}",
        )
