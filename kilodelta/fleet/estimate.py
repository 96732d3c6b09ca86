"""Estimate time and size of tasks: by those that are done, else by rules of thumb."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kilodelta.fleet.record import read_record
from kilodelta.fleet.task import Task

SECONDS: Mapping[str, tuple[float, float]] = {
    "compress": (60.0, 600.0),
    "onnx-base": (15.0, 20.0),
    "onnx": (0.3, 6.0),
    "tensorrt": (20.0, 60.0),
    "merge": (0.2, 4.0),
    "peft": (0.5, 10.0),
    "gguf": (0.5, 10.0),
    "adapter": (15.0, 20.0),
    "release": (8.0, 20.0),
    "bundle": (20.0, 60.0),
}
"""By kind: seconds that a task takes of any model, and per GB of it. Two cores of a server, ours;
what a compression takes depends on its inputs and steps (`kilodelta plan` measures it)."""

SIZES: Mapping[str, float] = {
    "compress": 0.0003,
    "onnx-base": 1.0,
    "onnx": 1.0,
    "tensorrt": 1.0,
    "merge": 1.0,
    "peft": 0.02,
    "gguf": 0.02,
    "adapter": 1.0,
    "release": 0.0003,
    "bundle": 1.5,
}
"""By kind: bytes of a result in multiples of the model's, in the model's own precision."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a task is expected to take.

    Attributes:
        seconds: of one process.
        nbytes: of its result.
        measured: by tasks of its kind that are done, not by a rule of thumb.
    """

    seconds: float
    nbytes: int
    measured: bool


def estimates(tasks: Iterable[Task], done: Iterable[Task], out: Path) -> dict[str, Estimate]:
    """Estimate tasks by their ids.

    Args:
        tasks: to estimate.
        done: tasks whose results are there.
        out: the fleet's folder of results.
    """
    seen: dict[tuple[str, int], list[tuple[float, int]]] = {}
    for task in done:
        record = read_record(out / task.place)
        if record is None:
            continue
        seconds, sizes = record.get("seconds"), record["files"].values()
        if isinstance(seconds, (int, float)) and all(isinstance(n, int) for n in sizes):
            seen.setdefault((task.kind, task.nbytes), []).append((float(seconds), sum(sizes)))
    return {task.id: _estimate(task, seen.get((task.kind, task.nbytes), [])) for task in tasks}


def _estimate(task: Task, like: list[tuple[float, int]]) -> Estimate:
    if like:
        seconds = sum(one for one, _ in like) / len(like)
        nbytes = sum(size for _, size in like) // len(like)
        return Estimate(seconds=seconds, nbytes=nbytes, measured=True)
    fixed, rate = SECONDS[task.kind]
    return Estimate(
        seconds=fixed + rate * task.nbytes / 1e9,
        nbytes=int(SIZES[task.kind] * task.nbytes),
        measured=False,
    )
