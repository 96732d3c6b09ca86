"""What every mode can do: build what a fine-tune needs, open it, try it, mix rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from kilodelta.errors import InputError
from kilodelta.format.delta import Delta
from kilodelta.verify.runners.runner import Arrays, Batch

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


def no_slots() -> InputError:
    """What `mixed` raises where a batch is computed with one fine-tune."""
    return InputError(
        "what is deployed here computes a batch with one fine-tune",
        fix="kilodelta bundle --mode adapter --slots N, or one run for each fine-tune",
    )
