"""Describe one piece of a fleet's work, and estimate the memory that it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MEMORY = {
    "compress": 8.0,
    "onnx-base": 6.0,
    "tensorrt": 8.0,
    "onnx": 1.0,
    "merge": 0.5,
    "peft": 1.0,
    "gguf": 1.0,
    "adapter": 6.0,
    "release": 6.0,
    "bundle": 8.0,
}
"""Memory by kind, in multiples of the model's bytes, above what the libraries themselves take."""
PAGE = "report.html"
"""A task's own report, where its kind has one."""
DEVICE = "device"
"""The device folder in the result of a bundle."""
LIBRARIES = {"compress", "onnx-base", "tensorrt", "adapter", "release", "bundle"}
"""Kinds that load torch."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One piece of work.

    Attributes:
        id: digest of `key`.
        kind: which function of `work.py` does it.
        name: for people, such as `intents/onnx16`.
        place: the folder of its result, relative to the fleet's output.
        key: everything that decides the result, as plain JSON.
        params: arguments of the function, paths as texts; `{out}/` stands before those of other
            tasks' results.
        needs: ids of the tasks before it.
        fine_tune: whose it is; empty for work that fine-tunes share.
        resources: what a cluster's machine must have.
        nbytes: of the models that it holds, for estimates of memory and time.
    """

    id: str
    kind: str
    name: str
    place: str
    key: Mapping[str, Any]
    params: Mapping[str, Any]
    needs: tuple[str, ...] = ()
    fine_tune: str = ""
    resources: Mapping[str, float] = field(default_factory=dict)
    nbytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**vars(self), "needs": list(self.needs)}


def memory_of(task: Task) -> int:
    """Return the bytes of memory that a task is expected to need."""
    own = 700 << 20 if task.kind in LIBRARIES else 200 << 20
    return own + int(MEMORY[task.kind] * task.nbytes)
