"""Find a machine's GPUs without loading a library, and share them among children."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from kilodelta.fleet.task import Task

VISIBLE = "CUDA_VISIBLE_DEVICES"
DEVICES = Path("/dev")
TAKING = {"compress"}
"""Kinds that compute on a GPU where there is one."""


def gpus_here() -> tuple[str, ...]:
    """Return what `CUDA_VISIBLE_DEVICES` may name here, one text for each GPU.

    Example:
        >>> os.environ[VISIBLE] = "2,3"
        >>> gpus_here()
        ('2', '3')
        >>> del os.environ[VISIBLE]
    """
    stated = os.environ.get(VISIBLE)
    if stated is not None:
        return tuple(part.strip() for part in stated.split(",") if part.strip())
    numbers = [m.group(1) for p in DEVICES.glob("nvidia*") if (m := _DEVICE.match(p.name))]
    return tuple(sorted(numbers, key=int))


_DEVICE = re.compile(r"nvidia(\d+)\Z")


def takes_gpu(task: Task) -> bool:
    """Return whether a task computes on a GPU: by its kind, or because its target says so."""
    return task.kind in TAKING or task.resources.get("GPU", 0) > 0


def gpus_for(tasks: Sequence[Task]) -> tuple[str, ...]:
    """Return the GPUs to share among tasks; none where no task or no machine has use for them."""
    return gpus_here() if any(map(takes_gpu, tasks)) else ()
