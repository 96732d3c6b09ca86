"""`kilodelta rollback`: serve again what was served before; it still lies there, probed."""

from __future__ import annotations

import os

from kilodelta.device.folder import fine_tune, journal, lock, state
from kilodelta.device.folder.places import Places
from kilodelta.device.folder.recover import recover
from kilodelta.device.folder.state import State
from kilodelta.device.update.apply import undone


def rollback(folder: str | os.PathLike[str]) -> State:
    """Go back one fine-tune; returns the state that now stands.

    Raises:
        DeviceError: no device folder, or nothing to go back to.
        LockedError: another command is changing it.
        ProofError: what lies there is not what was built.
        OutputError: the folder cannot be written.
    """
    places = Places.open(folder)
    with lock.held(places.lock):
        before = recover(places)
        after = before.rolled_back()
        with undone(places, after.sequence):
            if after.serving.folder:
                fine_tune.check(places.deltas / after.serving.folder)
            state.write(places, after)
            journal.append(places.journal, "rolled back", after.sequence, state=after.to_json())
    return after
