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

from kilodelta.device.folder.bundle import Bundle
from kilodelta.device.folder.places import Places
from kilodelta.device.modes.interface import DELTA as DELTA
from kilodelta.device.modes.interface import Mode as Mode
from kilodelta.device.modes.interface import Session as Session

Opener: TypeAlias = Callable[[Places, Bundle], Mode]


def _adapter(places: Places, bundle: Bundle) -> Mode:
    from kilodelta.device.modes.adapter import AdapterMode

    return AdapterMode(places, bundle)


def _patch(places: Places, bundle: Bundle) -> Mode:
    from kilodelta.device.modes.patch import PatchMode

    return PatchMode(places, bundle)


def _refit(places: Places, bundle: Bundle) -> Mode:
    from kilodelta.device.modes.refit import RefitMode

    return RefitMode(places, bundle)


OPENERS: dict[str, Opener] = {"adapter": _adapter, "patch": _patch, "refit": _refit}


def open_mode(places: Places, bundle: Bundle) -> Mode:
    """The bundle's mode.

    Raises:
        DeviceError: a file of `base/` is missing or damaged.
        MissingPackageError: the runtime is not installed.
    """
    return OPENERS[bundle.mode](places, bundle)
