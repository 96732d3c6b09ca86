"""`kilodelta status`: what a device folder is, what it serves, and what was done to it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kilodelta.device.folder.bundle import Bundle
from kilodelta.device.folder.device_folder import DeviceFolder
from kilodelta.device.folder.fine_tune import check_files, check_fine_tune
from kilodelta.device.folder.journal import SETTLED, Entry
from kilodelta.device.folder.metrics import metrics
from kilodelta.device.folder.state import State
from kilodelta.files import staging
from kilodelta.trust.policy import Pins


@dataclass(frozen=True, kw_only=True)
class Status:
    """A device folder at a glance.

    Attributes:
        folder: its path.
        bundle: what it is.
        pins: the keys, task and kind of a device that takes signed releases only, or None.
        state: what it serves.
        history: the journal's entries, oldest first.
        nbytes: on the disk: `base`, `deltas`, and what is `free`.
        unfinished: a command is at work, or was killed.
        checked: every byte was read and is as it was written.
    """

    folder: Path
    bundle: Bundle
    pins: Pins | None
    state: State
    history: tuple[Entry, ...]
    nbytes: Mapping[str, int]
    unfinished: bool
    checked: bool

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "folder": str(self.folder),
            "mode": self.bundle.mode,
            "dtype": self.bundle.dtype,
            "runtime": self.bundle.runtime,
            "base": {"name": self.bundle.base_name, "root": self.bundle.base_root},
            "ceiling": self.bundle.ceiling,
            "max_jump": self.bundle.max_jump,
            "max_work": self.bundle.max_work,
            "trust": None if self.pins is None else self.pins.to_json(),
            **self.state.to_json(),
            "history": [dict(entry) for entry in self.history],
            "bytes": dict(self.nbytes),
            "unfinished": self.unfinished,
            "checked": self.checked,
        }


def status(
    folder: str | os.PathLike[str],
    *,
    check: bool = False,
    prometheus: str | os.PathLike[str] | None = None,
) -> Status:
    """Look at a device folder; needs no lock and changes nothing.

    Args:
        folder: the device folder.
        check: read every byte of the base and of what is served, and compare the digests.
        prometheus: a file for the same as metrics, such as node_exporter's textfile collector
            reads; it is replaced by one rename.

    Raises:
        DeviceError: no device folder, or a damaged one.
        ProofError: a file is not what it was (`check`).
        OutputError: the journal cannot be read, or the metrics not be written.

    Example:
        >>> status("device/").state.highest  # doctest: +SKIP
        7
    """
    device = DeviceFolder.open(folder)
    state = device.state
    if check:
        check_files(device.base, device.bundle.files)
        for name in sorted(state.names()):
            check_fine_tune(device.fine_tune(name))
    history = tuple(device.journal.entries())
    seen = Status(
        folder=device.root,
        bundle=device.bundle,
        pins=device.pins,
        state=state,
        history=history,
        nbytes={
            "base": _size(device.base),
            "deltas": _size(device.deltas),
            "free": shutil.disk_usage(device.root).free,
        },
        unfinished=bool(history) and history[-1]["event"] not in SETTLED,
        checked=check,
    )
    if prometheus is not None:
        staging.write(Path(prometheus), metrics(seen).encode())
    return seen


def _size(folder: Path) -> int:
    """Add up the bytes on the disk; blocks that files share by copy-on-write count in each."""
    total = 0
    for place in folder.rglob("*"):
        try:
            total += place.lstat().st_blocks * 512
        except FileNotFoundError:  # an apply is at work
            continue
    return total
