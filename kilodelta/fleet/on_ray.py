"""Run a plan on a Ray cluster: each task is a child process on whichever machine has what it needs.

Ray places, retries and moves; nothing of that is ours. A task of Ray only starts
`python -m kilodelta.fleet.child`: Ray reuses its own processes, which keep the first number of
threads that they saw, and takes a command that ends by SystemExit for a crash. All machines must
see the output folder and the models under the same paths (a shared file system).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kilodelta import __version__
from kilodelta.files import canonical, staging
from kilodelta.files.staging.stage import explained
from kilodelta.fleet.child import thread_environment
from kilodelta.fleet.cluster import (
    Lack,
    connected,
    lacks,
    machines_of,
    options_of,
    require_resources,
)
from kilodelta.fleet.graph import Plan
from kilodelta.fleet.local import ANSWERS, FleetRun
from kilodelta.fleet.task import Task
from kilodelta.progress import Event, Progress, silent

RETRIES = 3
"""How often Ray runs a task again whose worker was lost."""

PATIENCE = 30.0
"""Seconds in which no task ends, after which it is seen whether the machines are still there."""


def run_on_ray(
    plan: Plan,
    *,
    address: str | None = None,
    cpus: int = 1,
    progress: Progress = silent,
) -> FleetRun:
    """Do what is open of a plan on a Ray cluster.

    Args:
        plan: from `make_plan`.
        address: of the cluster (`auto`, `ray://host:10001`); None starts one on this machine.
        cpus: of one task, and its threads.
        progress: called with the tasks done.

    Raises:
        InputError: a task needs what no machine of the cluster has, or no cluster answers.
        MissingPackageError: ray is not installed.
    """
    with explained(plan.out):
        plan.out.mkdir(parents=True, exist_ok=True)
    staging.sweep(plan.out)
    with connected(address) as ray:
        todo = list(plan.open_tasks())
        require_resources(todo, machines_of(ray), cpus)
        return _collect(ray, plan, todo, cpus, progress)


def _collect(ray: Any, plan: Plan, todo: list[Task], cpus: int, progress: Progress) -> FleetRun:
    remote = ray.remote(max_retries=RETRIES)(_started)
    done = {t.id for t in plan.tasks} - {t.id for t in todo}
    waiting, running = list(todo), dict[Any, Task]()
    answers: dict[str, Mapping[str, Any]] = {}
    skipped: dict[str, str] = {}
    lost: dict[str, str] = {}
    watch = _Watch(ray, cpus)
    while waiting or running:
        for task in list(waiting):
            if any(need in lost for need in task.needs):
                waiting.remove(task)
                cause = next(lost[need] for need in task.needs if need in lost)
                skipped[task.name] = lost[task.id] = cause
            elif done.issuperset(task.needs):
                waiting.remove(task)
                call = remote.options(**options_of(task, cpus))
                given = {"task": task.to_json(), "out": str(plan.out.resolve())}
                running[call.remote(given, cpus, __version__)] = task
        if not running:
            continue
        ended, _ = ray.wait(list(running), num_returns=1, timeout=PATIENCE)
        stranded = {} if ended else watch.stranded(running)
        for reference in (*ended, *stranded):
            task = running.pop(reference)
            if reference in stranded:
                ray.cancel(reference, force=True)
            answers[task.id] = answer = stranded.get(reference) or _answer(ray, reference, task)
            if answer["status"] == "done":
                done.add(task.id)
            else:
                lost[task.id] = task.name
            count = len(answers) + len(skipped)
            progress(Event(stage="fleet", done=count, total=len(todo), unit="tasks"))
    ordered = {t.id: answers[t.id] for t in todo if t.id in answers}
    before = len(plan.tasks) - len(todo)
    made = FleetRun(out=plan.out, answers=ordered, skipped=skipped, done_before=before)
    text = json.dumps(made.to_json(), indent=1, ensure_ascii=False)
    staging.write(plan.out / ANSWERS, text.encode("utf-8") + b"\n")
    return made


class _Watch:
    """Finds tasks that wait for a machine that has gone, for which Ray would wait for ever."""

    def __init__(self, ray: Any, cpus: int) -> None:
        self._ray, self._cpus = ray, cpus
        self._suspected: set[Any] = set()

    def stranded(self, running: Mapping[Any, Task]) -> dict[Any, dict[str, Any]]:
        """Return answers for tasks that no machine can run, now and when it was called before."""
        machines = machines_of(self._ray)
        missing = {
            r: found for r, t in running.items() if (found := lacks([t], machines, self._cpus))
        }
        again = {r: missing[r] for r in missing if r in self._suspected}
        self._suspected = set(missing)
        return {r: _gone(running[r], found) for r, found in again.items()}


def _gone(task: Task, missing: Sequence[Lack]) -> dict[str, Any]:
    return {
        "id": task.id,
        "name": task.name,
        "status": "failed",
        "error": f"a machine has left the cluster: {'; '.join(map(str, missing))}",
        "fix": "start it again, then run the fleet again",
        "exit_code": 1,
        "seconds": 0.0,
    }


def _answer(ray: Any, reference: Any, task: Task) -> Mapping[str, Any]:
    try:
        answer: Mapping[str, Any] = ray.get(reference)
    except ray.exceptions.RayError as error:
        told = str(error).strip().splitlines() or [type(error).__name__]
        return {
            "id": task.id,
            "name": task.name,
            "status": "failed",
            "error": told[-1][:500],
            "fix": "run the fleet again",
            "exit_code": 1,
            "seconds": 0.0,
        }
    return answer


def _started(given: dict[str, Any], threads: int, version: str) -> dict[str, Any]:
    """Run a task in a child process, with its threads limited, of the driver's version.

    It is what Ray runs.
    """
    task = given["task"]
    lost = {"id": task["id"], "name": task["name"], "status": "failed", "seconds": 0.0}
    if __version__ != version:
        return {
            **lost,
            "error": f"this machine has kilodelta {__version__}, the driver {version}",
            "fix": "install one version on all machines",
            "exit_code": 9,
        }
    done = subprocess.run(
        [sys.executable, "-m", "kilodelta.fleet.child"],
        input=canonical.dumps(given).encode("utf-8"),
        capture_output=True,
        check=False,
        env={**os.environ, **thread_environment(threads)},
        cwd=Path(given["out"]),
    )
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        text = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no word"]
        what = f"its process ended with code {done.returncode}: {text[-1][:300]}"
        return {**lost, "error": what, "fix": "run the fleet again", "exit_code": 1}
    return answer
