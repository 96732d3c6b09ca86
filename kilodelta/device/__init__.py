"""The device side: a folder that holds one base and takes fine-tunes of kilobytes.

Only `make`, `release` and `truth`, which run on a build machine, use torch and onnx.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kilodelta.device.serving import Device as Device

__all__ = ["Device"]


def __getattr__(name: str) -> Any:
    if name != "Device":
        raise AttributeError(f"module 'kilodelta.device' has no attribute {name!r}")
    from kilodelta.device.serving import Device

    return Device
