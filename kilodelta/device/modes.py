"""The three ways to bring a fine-tune into what is deployed, behind one small interface.

========  ===========================================================  ==========================
adapter   the low-rank factors are inputs of one graph                 NOLA, LoRA, VeRA, Uni-LoRA
patch     the tuned ONNX file, made of the base's by byte offsets      every method
refit     a TensorRT engine refitted with the merged weights           every method
========  ===========================================================  ==========================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias

from kilodelta.device.bundle import Bundle
from kilodelta.device.places import Places
from kilodelta.errors import InputError
from kilodelta.format.delta import Delta
from kilodelta.verify.runner import Arrays, Batch

DELTA = "delta.kd"
"""The fine-tune's own file, in its folder whatever the mode."""


class Session(Protocol):
    """One fine-tune, or the base, ready to compute."""

    def run(self, batch: Batch) -> Arrays:
        """The outputs by name."""


class Mode(Protocol):
    """One way to apply deltas, opened on one device folder."""

    held: int
    """Sessions to keep open: many where one costs kilobytes, few where it costs a model."""

    def build(self, delta: Delta, stage: Path) -> None:
        """Write into `stage`, which holds the file as `DELTA`, what `open` needs.

        Raises:
            KiloDeltaError: this delta cannot be applied here; whatever was written is removed.
        """

    def open(self, folder: Path | None) -> Session:
        """What `build` has written, or the base (None), ready to compute."""

    def trial(self, delta: Delta) -> Session:
        """A delta that was not applied, ready to compute; nothing is written."""

    def mixed(self, rows: Sequence[Session]) -> Session:
        """One batch whose rows are computed with sessions of this mode, a session a row.

        Raises:
            InputError: what is deployed computes a batch with one fine-tune, or with fewer.
        """

    @property
    def runtime(self) -> str:
        """The runtime and its version, which may change a result's last bits."""


Opener: TypeAlias = Callable[[Places, Bundle], Mode]


def _adapter(places: Places, bundle: Bundle) -> Mode:
    from kilodelta.device.mode_adapter import AdapterMode

    return AdapterMode(places, bundle)


def _patch(places: Places, bundle: Bundle) -> Mode:
    from kilodelta.device.mode_patch import PatchMode

    return PatchMode(places, bundle)


def _refit(places: Places, bundle: Bundle) -> Mode:
    from kilodelta.device.mode_refit import RefitMode

    return RefitMode(places, bundle)


OPENERS: dict[str, Opener] = {"adapter": _adapter, "patch": _patch, "refit": _refit}


def no_slots() -> InputError:
    """What `mixed` raises where a batch is computed with one fine-tune."""
    return InputError(
        "what is deployed here computes a batch with one fine-tune",
        fix="kilodelta bundle --mode adapter --slots N, or one run for each fine-tune",
    )


def open_mode(places: Places, bundle: Bundle) -> Mode:
    """The bundle's mode.

    Raises:
        DeviceError: a file of `base/` is missing or damaged.
        MissingPackageError: the runtime is not installed.
    """
    return OPENERS[bundle.mode](places, bundle)
