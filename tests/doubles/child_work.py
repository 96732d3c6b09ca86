"""Doubles of `kilodelta.fleet.child.do`, which a child finds by their names.

They stand in a module that loads nothing heavy, for every child imports it.
"""

from __future__ import annotations

import gc
import os
import signal
import time
from pathlib import Path
from typing import Any

from kilodelta.fleet import child
from kilodelta.fleet.gpus import VISIBLE


def seen(task: Any, out: Path, computed: Any) -> dict[str, Any]:
    """Tell which process this is, which GPU it sees, how far it lets others go first, and GC."""
    return {
        "gpu": os.environ.get(VISIBLE),
        "process": os.getpid(),
        "niceness": os.nice(0),
        "collects": gc.get_threshold(),
    }


class DyingOnce:
    """Kill the process of one task, the first time; do all others.

    Args:
        name: of the task.
        mark: a file that is made beforehand.
    """

    def __init__(self, name: str, mark: Path) -> None:
        self._name, self._mark = name, mark

    def __call__(self, task: Any, out: Path, computed: Any) -> dict[str, Any]:
        if task["name"] == self._name and not self._mark.exists():
            self._mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return child.do(task, out, computed)


def ending(task: Any, out: Path, computed: Any) -> dict[str, Any]:
    """End without an answer, each time: killed or by itself, as the file `how` says."""
    how = int((out / "how").read_text())
    if how < 0:
        os.kill(os.getpid(), -how)
    os._exit(how)


def slow_disk(task: Any, out: Path, computed: Any) -> dict[str, Any]:
    """Compute at once; then write until a file says that the disk is ready."""
    (out / task["id"]).touch()
    computed()
    while not (out / "ready").exists():
        time.sleep(0.005)
    return {"process": os.getpid()}
