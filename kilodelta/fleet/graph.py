"""Make tasks from a fleet: what is made of what, where it lies, and what is done already.

A task's id is a SHA-256 over everything that decides its result: its kind, the roots and digests of
what it reads, its options, the ids of the tasks before it and this tool's version. It stands in
`task.json` beside the result, so a result is either that of this very task, or it is made again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kilodelta import __version__
from kilodelta.errors import InputError, KiloDeltaError
from kilodelta.files import canonical
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.model_digest import digest
from kilodelta.fleet.definition import FineTune, Fleet, FleetBase, FleetTarget
from kilodelta.fleet.estimate import Estimate, estimates
from kilodelta.fleet.record import AGAIN, DONE, NEW, TaskState, state_of
from kilodelta.fleet.schema import NEEDS_INPUTS
from kilodelta.fleet.sources import file_digest
from kilodelta.fleet.task import DEVICE, Task, memory_of
from kilodelta.format.file import load
from kilodelta.grid.open import is_quantised
from kilodelta.progress import Event, Progress, silent

TRACED = {"onnx", "tensorrt"}
"""Kinds of targets that are made from one exported graph of the base; a quantised base has none,
for the graph of each fine-tune holds other codes."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All tasks of a fleet, each after those that it needs, and what is done of them.

    Attributes:
        out: the folder of results.
        tasks: in an order in which they can be done.
        states: what is done of them, by their ids.
        faults: by fine-tune, why its tasks will fail: a `.kd` file that is damaged, or of another
            base. Those tasks alone do.
    """

    out: Path
    tasks: tuple[Task, ...]
    states: Mapping[str, TaskState]
    faults: Mapping[str, str] = field(default_factory=dict)

    def open_tasks(self) -> tuple[Task, ...]:
        """Return the tasks whose result is not there."""
        return tuple(t for t in self.tasks if self.states[t.id].status != DONE)

    def estimates(self) -> dict[str, Estimate]:
        """Estimate the open tasks' time and size, by their ids."""
        todo = self.open_tasks()
        done = [task for task in self.tasks if self.states[task.id].status == DONE]
        return estimates(todo, done, self.out)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; seconds and bytes are estimates, of open tasks alone."""
        expected = self.estimates()
        rows = [
            {
                "id": t.id,
                "kind": t.kind,
                "name": t.name,
                "status": self.states[t.id].status,
                "why": self.states[t.id].why,
                "resources": dict(t.resources),
                "memory": memory_of(t),
                "seconds": round(expected[t.id].seconds, 1) if t.id in expected else None,
                "bytes": expected[t.id].nbytes if t.id in expected else None,
            }
            for t in self.tasks
        ]
        counts = {s: sum(r["status"] == s for r in rows) for s in (NEW, AGAIN, DONE)}
        totals = {
            "seconds": round(sum(one.seconds for one in expected.values()), 1),
            "bytes": sum(one.nbytes for one in expected.values()),
            "measured": sum(one.measured for one in expected.values()),
        }
        return {
            "out": str(self.out),
            "counts": counts,
            "expected": totals,
            "faults": dict(self.faults),
            "tasks": rows,
        }


def make_plan(fleet: Fleet, out: str | Path, *, progress: Progress = silent) -> Plan:
    """Make the tasks of a fleet and see what of them is done.

    Args:
        fleet: from `read_fleet`.
        out: the folder of results, which need not exist.
        progress: called while models are hashed; bases are remembered, as elsewhere.

    Raises:
        InputError: a target needs inputs and a fine-tune has none.
        CheckpointError: a model cannot be read.
    """
    maker = _Maker(fleet, progress)
    tasks = tuple(maker.tasks())
    place = Path(out)
    states = {task.id: state_of(task, place) for task in tasks}
    return Plan(out=place, tasks=tasks, states=states, faults=maker.faults)


class _Maker:
    """Makes tasks; models and inputs are hashed once, whoever needs them."""

    def __init__(self, fleet: Fleet, progress: Progress) -> None:
        self._fleet, self._progress = fleet, progress
        self._digests: dict[Path, str] = {}
        self._sizes: dict[Path, int] = {}
        self._shared: dict[str, Task] = {}
        self.faults: dict[str, str] = {}

    def tasks(self) -> Iterator[Task]:
        total = len(self._fleet.fine_tunes)
        for number, tune in enumerate(self._fleet.fine_tunes):
            self._progress(Event(stage="plan", done=number, total=total, unit="fine-tunes"))
            base = self._fleet.bases[tune.base]
            source, before = self._delta(tune, base)
            if before is not None:
                yield before
            for target in self._fleet.targets:
                yield from self._target(tune, base, target, source, before)

    def _model(self, path: Path) -> str:
        if path not in self._digests:
            checkpoint = Checkpoint.open(path)
            self._digests[path] = digest(checkpoint, progress=self._progress).root
            self._sizes[path] = sum(checkpoint.info(n).nbytes for n in checkpoint.names)
        return self._digests[path]

    def _file(self, path: Path | None) -> str:
        if path is None:
            return ""
        if path not in self._digests:
            self._digests[path] = file_digest(path)
        return self._digests[path]

    def _delta(self, tune: FineTune, base: FleetBase) -> tuple[dict[str, Any], Task | None]:
        """Return what later tasks know of the `.kd` file, and the task that makes it, if any."""
        root = self._model(base.path)
        if tune.delta is not None:
            if fault := self._fault(tune.delta, base, root):
                self.faults[tune.name] = fault
            return {"file": self._file(tune.delta), "path": str(tune.delta.resolve())}, None
        assert tune.tuned is not None
        place = f"fine-tunes/{tune.name}/delta"
        key = {
            "kind": "compress",
            "base": root,
            "tuned": self._model(tune.tuned),
            "inputs": self._file(tune.inputs),
            "labels": self._file(tune.labels),
            "options": dict(tune.compress),
            "model": base.model,
        }
        params = {
            "base": str(base.path.resolve()),
            "tuned": str(tune.tuned.resolve()),
            "inputs": None if tune.inputs is None else str(tune.inputs.resolve()),
            "labels": None if tune.labels is None else str(tune.labels.resolve()),
            "model": base.model or None,
            "options": dict(tune.compress),
            "name": tune.name,
        }
        task = self._task("compress", f"{tune.name}/delta", place, key, params, tune, base)
        return {"task": task.id, "path": f"{{out}}/{place}/{tune.name}.kd"}, task

    def _fault(self, delta: Path, base: FleetBase, root: str) -> str:
        """Say why tasks of a `.kd` file will fail, as far as it shows without merging."""
        try:
            manifest = load(delta).manifest
        except KiloDeltaError as error:
            return error.what
        # Of a quantised base the root is that of one layout, and others hold the same codes.
        if manifest.grid is not None or manifest.base.root == root:
            return ""
        made_for = f"{manifest.base.root} ({manifest.base.name or 'unnamed'})"
        return f"{delta} is made for the base {made_for}, and {base.name} is {root}"

    def _target(
        self,
        tune: FineTune,
        base: FleetBase,
        target: FleetTarget,
        source: Mapping[str, Any],
        before: Task | None,
    ) -> Iterator[Task]:
        if target.kind in NEEDS_INPUTS and target.options.get("probe", True) and not tune.inputs:
            raise InputError(
                f"target {target.name} needs inputs, and fine-tune {tune.name} has none",
                fix="give inputs in [[fine-tunes]] or [base.NAME], or probe = false",
            )
        needs = [] if before is None else [before.id]
        key = {
            "kind": target.kind,
            "base": self._model(base.path),
            "delta": {k: v for k, v in source.items() if k != "path"},
            "options": dict(target.options),
            "inputs": self._file(tune.inputs) if target.kind in NEEDS_INPUTS else "",
            "model": base.model,
        }
        params = {
            "base": str(base.path.resolve()),
            "delta": source["path"],
            "options": dict(target.options),
            "inputs": None if tune.inputs is None else str(tune.inputs.resolve()),
            "model": base.model or None,
            "name": tune.name,
        }
        if target.kind in TRACED and not is_quantised(base.path):
            shared = self._onnx_base(base, target.options.get("dtype", "fp32"))
            if shared.id not in self._shared:
                self._shared[shared.id] = shared
                yield shared
            needs.append(shared.id)
            key["template"] = shared.id
            params["template"] = f"{{out}}/{shared.place}"
        if "bundle" in target.options:
            shared = self._bundle(base, target)
            if shared.id not in self._shared:
                self._shared[shared.id] = shared
                yield shared
            needs.append(shared.id)
            key["bundle"] = shared.id
            params["device"] = f"{{out}}/{shared.place}/{DEVICE}"
        place = f"fine-tunes/{tune.name}/{target.name}"
        name = f"{tune.name}/{target.name}"
        yield self._task(target.kind, name, place, key, params, tune, base, needs, target.resources)

    def _onnx_base(self, base: FleetBase, dtype: str) -> Task:
        """Export the base's ONNX file and the map of its weights, once for all fine-tunes."""
        return self._of_base("onnx-base", f"onnx-{dtype}", base, {"dtype": dtype})

    def _bundle(self, base: FleetBase, target: FleetTarget) -> Task:
        """Make the device folder of one kind of device, once for all fine-tunes of a base.

        Raises:
            InputError: the base is quantised, and its engine is to be refitted.
        """
        wanted = target.options["bundle"]
        if wanted.get("mode") == "refit" and is_quantised(base.path):
            raise InputError(
                f"target {target.name} refits an engine, and base {base.name} is a quantised "
                "model, whose codes TensorRT does not refit",
                fix="give mode = 'patch' or mode = 'adapter'",
            )
        options = {"options": dict(target.options["bundle"])}
        named = {"name": base.name}
        return self._of_base(
            "bundle", f"device-{target.name}", base, options, named, target.resources
        )

    def _of_base(
        self,
        kind: str,
        name: str,
        base: FleetBase,
        options: dict[str, Any],
        shown: Mapping[str, Any] = MappingProxyType({}),
        resources: Mapping[str, float] | None = None,
    ) -> Task:
        """Make a task of a base alone; what is only `shown` does not change its result."""
        key = {
            "kind": kind,
            "base": self._model(base.path),
            **options,
            "inputs": self._file(base.inputs),
            "model": base.model,
        }
        params = {
            "base": str(base.path.resolve()),
            **options,
            "inputs": None if base.inputs is None else str(base.inputs.resolve()),
            "model": base.model or None,
            **shown,
        }
        name = f"{base.name}/{name}"
        return self._task(kind, name, f"bases/{name}", key, params, None, base, None, resources)

    def _task(
        self,
        kind: str,
        name: str,
        place: str,
        key: dict[str, Any],
        params: dict[str, Any],
        tune: FineTune | None,
        base: FleetBase,
        needs: list[str] | None = None,
        resources: Mapping[str, float] | None = None,
    ) -> Task:
        key = {**key, "tool": __version__}
        return Task(
            id=hashlib.sha256(canonical.dumps(key).encode("utf-8")).hexdigest(),
            kind=kind,
            name=name,
            place=place,
            key=key,
            params=params,
            needs=tuple(needs or ()),
            fine_tune="" if tune is None else tune.name,
            resources=resources or {},
            nbytes=self._sizes[base.path],
        )
