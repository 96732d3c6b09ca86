"""What every mode can do: build what a fine-tune needs, open it, try it, mix rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from kilodelta.errors import InputError
from kilodelta.format.delta import Delta
from kilodelta.verify.runners.runner import Arrays, Batch


class Session(Protocol):
    """One fine-tune, or the base, ready to compute."""

    def run(self, batch: Batch) -> Arrays:
        """Compute the outputs by name.

        Raises:
            ProofError: the model does not take these inputs.
        """


class Mode(Protocol):
    """One way to apply deltas, opened on one device folder.

    Attributes:
        held: sessions to keep open: many where one costs kilobytes, few where it costs a model.
        proves_result: whether `build` proves the digest of the merged weights. Where weights are
            never merged, only the probe tells that the fine-tune is there.
        runtime: the runtime and its version, which may change a result's last bits.
    """

    held: int
    proves_result: bool
    runtime: str

    def build(self, delta: Delta, stage: Path) -> None:
        """Write into `stage`, which holds the file as `DELTA`, what `open` needs.

        Raises:
            KiloDeltaError: this delta cannot be applied here; what was written is removed.
        """

    def open(self, folder: Path | None) -> Session:
        """Open what `build` has written, or the base (None)."""

    def trial(self, delta: Delta) -> Session:
        """Open a delta that was not applied; nothing is written."""

    def mixed(self, rows: Sequence[Session]) -> Session:
        """Open one batch whose rows are computed with these sessions, one per row.

        Raises:
            InputError: what is deployed computes a batch with one fine-tune, or with fewer.
        """


def no_slots() -> InputError:
    """Return what `mixed` raises where a batch is computed with one fine-tune."""
    return InputError(
        "what is deployed here computes a batch with one fine-tune",
        fix="kilodelta bundle --mode adapter --slots N, or one run for each fine-tune",
    )
