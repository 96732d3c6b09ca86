"""Before every change: what a killed command left behind is removed, and what stands is known."""

from __future__ import annotations

import shutil
from pathlib import Path

from kilodelta.device.folder import journal, state
from kilodelta.device.folder.places import Places
from kilodelta.device.folder.state import State
from kilodelta.errors import DeviceError
from kilodelta.files.untrusted import FieldError

FINAL = frozenset({"bundled", "committed", "rolled back", "failed", "recovered"})
"""Events after which nothing is under way."""


def recover(places: Places) -> State:
    """The state that stands; the caller holds the lock.

    Raises:
        DeviceError: neither `current` nor the journal can be read.
        OutputError: the folder cannot be written.
    """
    journal.repair(places.journal)
    entries = journal.read(places.journal)
    found = _state(places, entries)
    removed = sweep(places, found)
    if entries and entries[-1]["event"] not in FINAL:
        journal.append(
            places.journal, "recovered", found.sequence, removed=removed, state=found.to_json()
        )
    return found


def sweep(places: Places, found: State) -> list[str]:
    """Remove whatever a state does not name: stages, folders of fine-tunes that never came to be
    served, and those too old to go back to. Returns their names."""
    stages = [path for path in places.root.iterdir() if path.name.endswith(".tmp")]
    stay = found.names()
    away = stages + [path for path in places.deltas.iterdir() if path.name not in stay]
    return [path.name for path in away if _remove(path)]


def _state(places: Places, entries: list[journal.Entry]) -> State:
    """`current`; where it is lost, the journal's last state, written anew."""
    try:
        return state.read(places)
    except DeviceError as problem:
        found = _last(entries)
        if found is None:
            raise DeviceError(
                problem.what, fix="the journal is lost too: copy the bundle to the device again"
            ) from None
    state.write(places, found)
    return found


def _last(entries: list[journal.Entry]) -> State | None:
    for entry in reversed(entries):
        try:
            return state.parse(entry.get("state"))
        except FieldError:
            continue
    return None


def _remove(path: Path) -> bool:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    return not path.exists()
