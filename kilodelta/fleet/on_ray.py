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
from kilodelta.errors import InputError, require
from kilodelta.files import canonical, staging
from kilodelta.fleet.child import thread_environment
from kilodelta.fleet.graph import Plan
from kilodelta.fleet.local import ANSWERS, FleetRun
from kilodelta.fleet.task import Task, memory_of
from kilodelta.progress import Event, Progress, silent

RETRIES = 3
"""How often Ray runs a task again whose worker was lost."""


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
        InputError: a task needs what no machine of the cluster has, or another version runs there.
        MissingPackageError: ray is not installed.
    """
    require("ray", extra="ray", why="run on a Ray cluster")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    plan.out.mkdir(parents=True, exist_ok=True)
    staging.sweep(plan.out)
    ours = not ray.is_initialized()
    if ours:
        options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
        ray.init(address=address, **({"logging_level": "error"} if address else options))
    try:
        todo = list(plan.open_tasks())
        require_resources(todo, ray.cluster_resources(), cpus)
        return _collect(ray, plan, todo, cpus, progress)
    finally:
        if ours:
            ray.shutdown()


def require_resources(tasks: Sequence[Task], there: Mapping[str, float], cpus: int = 1) -> None:
    """Refuse tasks that would wait for ever, and without a word.

    Args:
        tasks: to run.
        there: `ray.cluster_resources()`.
        cpus: of one task.

    Raises:
        InputError: naming task and resource.
    """
    for task in tasks:
        wanted = {"CPU": float(cpus), "memory": float(memory_of(task)), **task.resources}
        for name, amount in wanted.items():
            if amount > there.get(name, 0.0):
                raise InputError(
                    f"{task.name} needs {amount:g} of {name!r}, the cluster has "
                    f"{there.get(name, 0.0):g}",
                    fix="start a machine with it: ray start --resources='{\"NAME\": 1}'",
                )


def _collect(ray: Any, plan: Plan, todo: list[Task], cpus: int, progress: Progress) -> FleetRun:
    remote = ray.remote(max_retries=RETRIES)(_started)
    done = {t.id for t in plan.tasks} - {t.id for t in todo}
    waiting, running = list(todo), dict[Any, Task]()
    answers: dict[str, Mapping[str, Any]] = {}
    skipped: dict[str, str] = {}
    lost: dict[str, str] = {}
    while waiting or running:
        for task in list(waiting):
            if any(need in lost for need in task.needs):
                waiting.remove(task)
                cause = next(lost[need] for need in task.needs if need in lost)
                skipped[task.name] = lost[task.id] = cause
            elif done.issuperset(task.needs):
                waiting.remove(task)
                options = {"num_cpus": cpus, "memory": memory_of(task), "name": task.name}
                options["resources"] = dict(task.resources)
                call = remote.options(**options)
                given = {"task": task.to_json(), "out": str(plan.out.resolve())}
                running[call.remote(given, cpus, __version__)] = task
        if not running:
            continue
        ended, _ = ray.wait(list(running), num_returns=1)
        for reference in ended:
            task = running.pop(reference)
            answers[task.id] = answer = _answer(ray, reference, task)
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
