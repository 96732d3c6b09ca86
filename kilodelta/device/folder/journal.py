"""The journal: what was done to a device folder, one JSON object per line, oldest first.

A line counts when it is complete. A command that was killed can leave part of one at the end, which
readers pass over and the next command removes. Entries with a `state` are a second copy of
`current`, so the newest of them is never dropped.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from kilodelta.device.folder.state import State, parse_state
from kilodelta.errors import OutputError, printable
from kilodelta.files import canonical, plain, staging, untrusted

log = logging.getLogger(__name__)

Entry: TypeAlias = Mapping[str, Any]

LIMIT = 1 << 20
"""Bytes from which on only the newest half is kept."""

LINE = 1 << 14
"""Bytes of one entry at most; an `apply` writes four of about 300."""

TEXT = 500
"""Characters of one text in an entry."""

SETTLED = frozenset({"bundled", "committed", "rolled back", "failed", "recovered"})
"""Events after which nothing is under way."""


@dataclass(frozen=True)
class Journal:
    """The journal at `path`; the file may be missing."""

    path: Path

    def append(self, event: str, sequence: int, **facts: Any) -> None:
        """Add one entry; it lies on the disk when this returns.

        Args:
            event: what happened.
            sequence: the number of the step.
            facts: more of it, plain JSON values. Texts are escaped and cut; if the entry is still
                too long, only its state is kept.

        Raises:
            OutputError: it cannot be written. The journal is as it was, or ends in part of a line.
        """
        log.info("%s: %s", self.path.parent, event)
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        entry = {"at": at, "event": event, "sequence": sequence}
        line = canonical.dumps(_short(entry | facts)).encode()
        if len(line) > LINE:
            kept = {"state": facts["state"]} if "state" in facts else {}
            line = canonical.dumps(entry | kept).encode()
        try:
            self._write(line + b"\n")
        except OSError as problem:
            raise OutputError(
                f"{self.path} cannot be written: {problem.strerror or problem}",
                fix="check the folder, its permissions and the free space",
            ) from problem

    def _write(self, line: bytes) -> None:
        descriptor = plain.open_file(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            while line:
                # A disk that is nearly full takes a part.
                line = line[os.write(descriptor, line) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def entries(self) -> list[Entry]:
        """Return all complete entries; lines that are no JSON objects are passed over.

        Raises:
            OutputError: the journal is no regular file, or cannot be read.
        """
        # Behind the last newline stands nothing, or part of a line that a killed command left.
        lines = self._data()[0].split(b"\n")[:-1]
        return [entry for line in lines if (entry := _parse(line)) is not None]

    def _data(self) -> tuple[bytes, bool]:
        """Return the file's newest bytes from the beginning of a line, and whether that is all."""
        try:
            descriptor = plain.open_file(self.path)
            with os.fdopen(descriptor, "rb") as file:
                skipped = max(0, os.fstat(descriptor).st_size - 2 * LIMIT)
                file.seek(skipped)
                data = file.read(2 * LIMIT)
        except FileNotFoundError:
            return b"", True
        except OSError as problem:
            raise OutputError(
                f"{self.path} {problem.strerror or problem}",
                fix="remove it: `current` says what is served, and a new journal is begun",
            ) from None
        return (data[data.find(b"\n") + 1 :], False) if skipped else (data, True)

    def repair(self) -> None:
        """Remove part of a line at the end, and old entries where there are too many.

        Raises:
            OutputError: it cannot be read or written.
        """
        data, is_all = self._data()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) > LIMIT:
            whole = _newest_half(whole)
        # Another name of the same file, as `cp -al` makes, would get our lines as well.
        if whole != data or not is_all or self._is_shared():
            staging.write(self.path, whole)

    def _is_shared(self) -> bool:
        return self.path.exists() and self.path.lstat().st_nlink > 1


def last_state(entries: Sequence[Entry]) -> State | None:
    """Return the newest state that entries hold, or None."""
    for entry in reversed(entries):
        try:
            return parse_state(entry.get("state"))
        except untrusted.FieldError:
            continue
    return None


def _newest_half(whole: bytes) -> bytes:
    """Keep the newest half of the lines and, before it, the newest state if that is older."""
    lines = whole.splitlines(keepends=True)
    kept, size = len(lines), 0
    while kept and size + len(lines[kept - 1]) <= LIMIT // 2:
        kept -= 1
        size += len(lines[kept])
    newest = b"".join(lines[kept:])
    if any(_has_state(line) for line in lines[kept:]):
        return newest
    older = (line for line in reversed(lines[:kept]) if _has_state(line))
    return next(older, b"") + newest


def _has_state(line: bytes) -> bool:
    entry = _parse(line)
    return entry is not None and last_state([entry]) is not None


def _parse(line: bytes) -> Entry | None:
    try:
        value = canonical.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and isinstance(value.get("event"), str) else None


def _short(value: Any) -> Any:
    """Return the same JSON value with its texts escaped and cut."""
    if isinstance(value, str):
        return printable(value, TEXT)
    if isinstance(value, Mapping):
        return {printable(str(key), TEXT): _short(item) for key, item in value.items()}
    return [_short(item) for item in value] if isinstance(value, (list, tuple)) else value
