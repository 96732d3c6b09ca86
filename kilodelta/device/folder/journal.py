"""The journal: what was done to a device folder, one JSON object a line, oldest first.

A line is complete when it ends; a command that was killed can leave a part of one at the end, which
readers pass over and the next command removes.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, TypeAlias

from kilodelta.errors import OutputError
from kilodelta.files import canonical, staging

Entry: TypeAlias = dict[str, Any]

LIMIT = 1 << 20
"""Bytes from which on only the newest half is kept."""


def append(path: Path, event: str, sequence: int, **facts: Any) -> None:
    """Add one entry, on the disk when this returns.

    Raises:
        OutputError: it cannot be written; the journal is as it was, or ends in a part of a line.
    """
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    line = canonical.dumps({"at": now, "event": event, "sequence": sequence, **facts}) + "\n"
    try:
        _write(path, line.encode())
    except OSError as problem:
        raise OutputError(
            f"{path} cannot be written: {problem.strerror or problem}",
            fix="check the folder, its permissions and the free space",
        ) from problem


def _write(path: Path, line: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        while line:
            line = line[os.write(descriptor, line) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path) -> list[Entry]:
    """All complete entries; lines that are no JSON objects are passed over."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    return [entry for line in data.split(b"\n")[:-1] if (entry := _parse(line)) is not None]


def _parse(line: bytes) -> Entry | None:
    try:
        found = canonical.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("event"), str) else None


def repair(path: Path) -> None:
    """Remove a part of a line at the end, and old entries where there are too many.

    Raises:
        OutputError: it cannot be written.
    """
    data = path.read_bytes() if path.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) > LIMIT:
        whole = whole[whole.index(b"\n", len(whole) // 2) + 1 :]
    if whole != data:
        staging.write(path, whole)
