"""What a device serves: `current`, one small file that only ever changes by a rename.

This file is the truth. Everything that it names lay on the disk in full before it was written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kilodelta.errors import DeviceError
from kilodelta.files import canonical, plain, staging, untrusted

_FOLDER = re.compile(r"[0-9]{6,}-[0-9a-f]{12}\Z")
_LIMIT = 1 << 20
"""Bytes of `current`; a fine-tune to go back to takes 150."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """One fine-tune on a device; the base itself has neither folder nor digest.

    Attributes:
        folder: its name in `deltas/`.
        delta: `sha256:<hex>` of its `.kd` file.
        version: the file's version; 0 where it states none.
    """

    folder: str = ""
    delta: str = ""
    version: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dict(vars(self))


BASE = Served()


@dataclass(frozen=True, kw_only=True)
class State:
    """What is served, and what a rollback goes back to.

    Attributes:
        sequence: the number of the last step that changed the state; it only grows.
        highest: the highest version that was ever served; it only grows.
        serving: what is served.
        before: what a rollback goes back to, newest first.
        seen: seconds since 1970 UTC that have certainly passed, as signed releases state them; it
            only grows, and no expiry is judged by an earlier time.

    Example:
        >>> fresh = Served(folder="000001-0123456789ab", delta="sha256:" + "01" * 32, version=3)
        >>> after = State().committed(fresh, keep=1)
        >>> after.highest, after.rolled_back().serving == BASE
        (3, True)
    """

    sequence: int = 0
    highest: int = 0
    serving: Served = BASE
    before: tuple[Served, ...] = ()
    seen: int = 0

    def names(self) -> set[str]:
        """Return the folders in `deltas/` that must stay."""
        return {item.folder for item in (self.serving, *self.before) if item.folder}

    def committed(self, fresh: Served, keep: int, seen: int = 0) -> State:
        """Return the state that serves `fresh`, with `keep` fine-tunes to go back to."""
        same = fresh.delta == self.serving.delta  # the same file again: no step back to itself
        before = self.before if same else (self.serving, *self.before)
        return State(
            sequence=self.sequence + 1,
            highest=max(self.highest, fresh.version),
            serving=fresh,
            before=before[:keep],
            seen=max(self.seen, seen),
        )

    def rolled_back(self) -> State:
        """Return the state that serves what was served before.

        Raises:
            DeviceError: there is nothing to go back to.
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
        """Return plain JSON values; `seen` only where something was signed, as 0.1 writes it."""
        later = {"seen": self.seen} if self.seen else {}
        return {
            "sequence": self.sequence,
            "highest": self.highest,
            "serving": self.serving.to_json(),
            "before": [item.to_json() for item in self.before],
            **later,
        }


def read_state(path: Path) -> State:
    """Read `current`.

    Raises:
        DeviceError: the file is missing or damaged.
    """
    try:
        return parse_state(canonical.loads(plain.read(path, _LIMIT)))
    except (OSError, ValueError) as problem:
        raise DeviceError(
            f"{path} cannot be read: {getattr(problem, 'strerror', None) or problem}",
            fix="apply or roll back: that writes it anew from the journal",
        ) from None


def write_state(path: Path, state: State) -> None:
    """Make a state the current one by one rename.

    Raises:
        OutputError: it cannot be written, or not synced to the disk after the rename;
            `read_state` says which state stands.
    """
    staging.write(path, (canonical.dumps(state.to_json()) + "\n").encode())


def parse_state(value: Any) -> State:
    """Check a state from JSON.

    Raises:
        FieldError: names the field that is wrong.
    """
    later = {"seen"} & set(untrusted.mapping(value, "state"))
    table = untrusted.table(value, "state", {"sequence", "highest", "serving", "before"} | later)
    return State(
        sequence=untrusted.whole(table["sequence"], "state.sequence"),
        highest=untrusted.whole(table["highest"], "state.highest"),
        serving=_served(table["serving"], "state.serving"),
        before=untrusted.listed(table["before"], "state.before", _served),
        seen=untrusted.whole(table.get("seen", 0), "state.seen"),
    )


def _served(value: Any, where: str) -> Served:
    table = untrusted.table(value, where, {"folder", "delta", "version"})
    version = untrusted.whole(table["version"], f"{where}.version")
    if table["folder"] == table["delta"] == "":
        return replace(BASE, version=version)
    folder = untrusted.file_name(table["folder"], f"{where}.folder")
    if not _FOLDER.match(folder):
        raise untrusted.FieldError(f"{where}.folder is {folder!r:.80}, no folder of deltas/")
    delta = untrusted.digest(table["delta"], f"{where}.delta")
    return Served(folder=folder, delta=delta, version=version)
