"""Bring a fine-tune into what is deployed, in one of three ways behind one small interface.

========  ===========================================================  ==========================
adapter   the low-rank factors are inputs of one graph                 NOLA, LoRA, VeRA, Uni-LoRA
patch     the tuned ONNX file, made of the base's by byte offsets      every method
refit     a TensorRT engine refitted with the merged weights           every method
========  ===========================================================  ==========================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from kilodelta.device.folder.device_folder import DeviceFolder
from kilodelta.device.modes.interface import Mode as Mode
from kilodelta.device.modes.interface import Session as Session

__all__ = ["Mode", "Session", "open_mode"]

Opener: TypeAlias = Callable[[DeviceFolder], Mode]


def _adapter(folder: DeviceFolder) -> Mode:
    from kilodelta.device.modes.adapter import AdapterMode

    return AdapterMode(folder)


def _patch(folder: DeviceFolder) -> Mode:
    from kilodelta.device.modes.patch import PatchMode

    return PatchMode(folder)


def _refit(folder: DeviceFolder) -> Mode:
    from kilodelta.device.modes.refit import RefitMode

    return RefitMode(folder)


OPENERS: dict[str, Opener] = {"adapter": _adapter, "patch": _patch, "refit": _refit}
"""The modes by name; each is imported when a folder of its kind is opened."""


def open_mode(folder: DeviceFolder) -> Mode:
    """Open what a folder deploys, in its mode.

    Raises:
        DeviceError, FileError: a file of `base/` is missing or damaged.
        MissingPackageError: the runtime is not installed.
    """
    return OPENERS[folder.bundle.mode](folder)
