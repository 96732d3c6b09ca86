"""`kilodelta status`: what a device folder is, what it serves, and what was done to it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kilodelta.device.folder import bundle as bundles
from kilodelta.device.folder import fine_tune, journal, state
from kilodelta.device.folder.bundle import Bundle
from kilodelta.device.folder.places import Places
from kilodelta.device.folder.recover import FINAL
from kilodelta.device.folder.state import State


@dataclass(frozen=True, kw_only=True)
class Status:
    """A device folder at a glance. `nbytes` holds `base`, `deltas` and `free`, of the disk;
    `unfinished` says that a command is at work or was killed."""

    folder: Path
    bundle: Bundle
    state: State
    history: tuple[Mapping[str, Any], ...]
    nbytes: Mapping[str, int]
    unfinished: bool
    checked: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "mode": self.bundle.mode,
            "dtype": self.bundle.dtype,
            "runtime": self.bundle.runtime,
            "base": {"name": self.bundle.name, "root": self.bundle.root},
            **self.state.to_json(),
            "history": list(self.history),
            "bytes": dict(self.nbytes),
            "unfinished": self.unfinished,
            "checked": self.checked,
        }


def status(folder: str | os.PathLike[str], *, check: bool = False) -> Status:
    """Look at a device folder; needs no lock and changes nothing.

    Args:
        check: read every byte of the base and of what is served, and compare the digests.

    Raises:
        DeviceError: no device folder, or a damaged one.
        ProofError: a file is not what it was (`check`).
    """
    places = Places.open(folder)
    bundle, found = bundles.read(places), state.read(places)
    if check:
        bundles.check_files(places.base, bundle.files)
        for name in sorted(found.names()):
            fine_tune.check(places.deltas / name)
    history = journal.read(places.journal)
    return Status(
        folder=places.root,
        bundle=bundle,
        state=found,
        history=tuple(history),
        nbytes={
            "base": _size(places.base),
            "deltas": _size(places.deltas),
            "free": shutil.disk_usage(places.root).free,
        },
        unfinished=bool(history) and history[-1]["event"] not in FINAL,
        checked=check,
    )


def _size(folder: Path) -> int:
    """Bytes on the disk; blocks that files share by copy-on-write count in each."""
    total = 0
    for place in folder.rglob("*"):
        try:
            total += place.stat().st_blocks * 512
        except FileNotFoundError:  # an apply is at work
            continue
    return total
