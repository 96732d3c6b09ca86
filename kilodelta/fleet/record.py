"""Read the record beside a task's result, `task.json`, and see whether that result still counts.

The record holds the task's id and key, and the size of each file of the result.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kilodelta.files import plain
from kilodelta.fleet.task import Task

RECORD = "task.json"
MAX_RECORD = 1 << 20
NEW, DONE, AGAIN = "new", "done", "again"


@dataclass(frozen=True, kw_only=True)
class TaskState:
    """Whether a task's result is there: `new`, `done`, or `again` and why."""

    status: str
    why: str = ""


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return a result's `task.json`, or None where there is none that can be used."""
    try:
        value = json.loads(plain.read(folder / RECORD, MAX_RECORD))
    except (OSError, ValueError, RecursionError):
        return None
    good = isinstance(value, dict) and isinstance(value.get("files"), dict)
    return value if good and isinstance(value.get("key"), dict) else None


def state_of(task: Task, out: Path) -> TaskState:
    """See whether a task's result is there, whole, and of this very task."""
    folder = out / task.place
    record = read_record(folder)
    if record is None:
        return (
            TaskState(status=NEW)
            if not folder.exists()
            else TaskState(status=AGAIN, why="its task.json is missing or damaged")
        )
    if record.get("id") != task.id:
        changed = [k for k in task.key if record["key"].get(k) != task.key[k]]
        return TaskState(status=AGAIN, why=f"changed: {', '.join(changed) or 'its definition'}")
    for name, nbytes in record["files"].items():
        try:
            size = (folder / name).stat().st_size
        except (OSError, ValueError):
            return TaskState(status=AGAIN, why=f"{name} is missing")
        if size != nbytes:
            return TaskState(status=AGAIN, why=f"{name} has {size} bytes, not {nbytes}")
    return TaskState(status=DONE)
