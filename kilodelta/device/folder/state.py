"""What a device serves: `current`, one small file that only ever changes by a rename.

This file is the truth. Everything that it names lay on the disk in full before it was written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from kilodelta.device.folder.places import Places
from kilodelta.errors import DeviceError
from kilodelta.files import canonical, staging, untrusted

_FOLDER = re.compile(r"[0-9]{6,}-[0-9a-f]{12}\Z")


@dataclass(frozen=True, kw_only=True)
class Served:
    """One fine-tune on a device: its folder in `deltas/`, its file's SHA-256, its version.

    The base itself has neither folder nor digest.
    """

    folder: str = ""
    delta: str = ""
    version: int = 0


BASE = Served()


@dataclass(frozen=True, kw_only=True)
class State:
    """What is served, what a rollback goes back to (newest first), and two numbers that only grow:
    of the last step that changed the state, and the highest version that was ever served."""

    sequence: int = 0
    highest: int = 0
    serving: Served = BASE
    before: tuple[Served, ...] = ()

    def names(self) -> set[str]:
        """The folders that must stay."""
        return {item.folder for item in (self.serving, *self.before) if item.folder}

    def committed(self, fresh: Served, keep: int) -> State:
        """The state that serves `fresh`, with `keep` fine-tunes to go back to."""
        same = fresh.delta == self.serving.delta  # the same file again: no step back to itself
        before = self.before if same else (self.serving, *self.before)
        return State(
            sequence=self.sequence + 1,
            highest=max(self.highest, fresh.version),
            serving=fresh,
            before=before[:keep],
        )

    def rolled_back(self) -> State:
        """The state before.

        Raises:
            DeviceError: there is none.
        """
        if not self.before:
            raise DeviceError(
                "there is nothing to go back to",
                fix="apply the file that shall be served, with --allow-downgrade if it is older",
            )
        return replace(
            self, sequence=self.sequence + 1, serving=self.before[0], before=self.before[1:]
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "sequence": self.sequence,
            "highest": self.highest,
            "serving": vars(self.serving),
            "before": [vars(item) for item in self.before],
        }


def read(places: Places) -> State:
    """The state as it is now.

    Raises:
        DeviceError: the file is missing or damaged.
    """
    try:
        return parse(canonical.loads(places.current.read_bytes()))
    except (OSError, ValueError) as problem:
        raise DeviceError(
            f"{places.current} cannot be read: {problem}",
            fix="apply or roll back: that writes it anew from the journal",
        ) from None


def write(places: Places, state: State) -> None:
    """Make a state the current one, in full or not at all.

    Raises:
        OutputError: it cannot be written; the old one stands.
    """
    staging.write(places.current, (canonical.dumps(state.to_json()) + "\n").encode())


def parse(value: Any) -> State:
    """A state from JSON.

    Raises:
        FieldError: naming the field that is wrong.
    """
    found = untrusted.table(value, "state", {"sequence", "highest", "serving", "before"})
    return State(
        sequence=untrusted.whole(found["sequence"], "state.sequence"),
        highest=untrusted.whole(found["highest"], "state.highest"),
        serving=_served(found["serving"], "state.serving"),
        before=untrusted.listed(found["before"], "state.before", _served),
    )


def _served(value: Any, where: str) -> Served:
    found = untrusted.table(value, where, {"folder", "delta", "version"})
    version = untrusted.whole(found["version"], f"{where}.version")
    if found["folder"] == found["delta"] == "":
        return replace(BASE, version=version)
    folder = untrusted.file_name(found["folder"], f"{where}.folder")
    if not _FOLDER.match(folder):
        raise untrusted.FieldError(f"{where}.folder is {folder!r:.80}, no folder of deltas/")
    delta = untrusted.digest(found["delta"], f"{where}.delta")
    return Served(folder=folder, delta=delta, version=version)
