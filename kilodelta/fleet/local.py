"""Run a plan on this machine: a pool of threads, each waiting for one child process at a time.

A killed child costs its own task, unlike a process pool's worker, which takes all tasks of the pool
with it. How children are started and ended: `processes.py`.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kilodelta import memory
from kilodelta.errors import InputError, OutputError
from kilodelta.files import staging
from kilodelta.files.staging.stage import explained
from kilodelta.fleet.gpus import gpus_for
from kilodelta.fleet.graph import Plan
from kilodelta.fleet.processes import Children
from kilodelta.fleet.task import Task, memory_of
from kilodelta.progress import Event, Progress, silent

ANSWERS = "run.json"
_GUESS = 4 << 30
"""Bytes of memory to share out where the system does not say; less than most machines have."""


@dataclass(frozen=True, kw_only=True)
class FleetRun:
    """What became of every open task of a plan, as the children answered.

    Attributes:
        out: where the results are.
        answers: by task id, in the order of the plan.
        skipped: tasks that were not begun, because one before them failed, with its name.
        done_before: how many tasks needed no work.
    """

    out: Path
    answers: Mapping[str, Mapping[str, Any]]
    skipped: Mapping[str, str]
    done_before: int

    @property
    def failed(self) -> tuple[Mapping[str, Any], ...]:
        """Answers of tasks that did not come out."""
        return tuple(a for a in self.answers.values() if a["status"] != "done")

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "out": str(self.out),
            "done": sum(a["status"] == "done" for a in self.answers.values()),
            "done_before": self.done_before,
            "failed": [dict(a) for a in self.failed],
            "skipped": dict(self.skipped),
            "seconds": round(sum(a["seconds"] for a in self.answers.values()), 3),
        }


def shard_of(tasks: Sequence[Task], shard: tuple[int, int] | None) -> list[Task]:
    """Return the tasks of one of n shards: every n-th fine-tune, and what they share.

    Args:
        tasks: of a plan.
        shard: (k, n) with 1 <= k <= n, or None for all.

    Raises:
        InputError: there is no such shard.
    """
    if shard is None:
        return list(tasks)
    k, n = shard
    if not 1 <= k <= n:
        most = max(1, n)
        raise InputError(
            f"there is no shard {k} of {n}", fix=f"write --shard 1/{most} to --shard {most}/{most}"
        )
    names = list(dict.fromkeys(t.fine_tune for t in tasks if t.fine_tune))
    mine = set(names[k - 1 :: n])
    needed = {i for t in tasks if t.fine_tune in mine for i in t.needs}
    return [t for t in tasks if t.fine_tune in mine or t.id in needed]


def choose_jobs(tasks: Sequence[Task], jobs: int | None) -> int:
    """Return how many tasks run at once: what was asked for, else what this machine allows.

    That is by its cores and memory, and one for each GPU where tasks compute on GPUs.
    """
    if jobs is not None:
        if jobs < 1:
            raise InputError(f"{jobs} jobs make no sense", fix="give 1 or more, or leave it out")
        return jobs
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    largest = max((memory_of(t) for t in tasks), default=1)
    most = len(gpus_for(tasks)) or cores or 1
    return max(1, min(cores or 1, most, int(0.8 * memory.available(_GUESS) / largest), len(tasks)))


def run(
    plan: Plan,
    *,
    jobs: int | None = None,
    shard: tuple[int, int] | None = None,
    progress: Progress = silent,
) -> FleetRun:
    """Do what is open of a plan. Failures stop what depends on them and nothing else.

    Args:
        plan: from `make_plan`.
        jobs: tasks at once; None for what cores and memory allow.
        shard: (k, n): do the k-th of n parts only.
        progress: called with the tasks done.

    Raises:
        InputError: jobs or shard make no sense.
        OutputError: the output folder cannot be written.
    """
    chosen = shard_of(plan.tasks, shard)
    done = {t.id for t in plan.tasks} - {t.id for t in plan.open_tasks()}
    todo = [t for t in chosen if t.id not in done]
    before = len(chosen) - len(todo)
    with explained(plan.out):
        plan.out.mkdir(parents=True, exist_ok=True)
    staging.sweep(plan.out)
    workers = choose_jobs(todo, jobs)
    with Children(todo, plan.out, workers) as children:
        answers, skipped = _run_all(todo, done, workers, children, progress)
    ordered = {t.id: answers[t.id] for t in todo if t.id in answers}
    made = FleetRun(out=plan.out, answers=ordered, skipped=skipped, done_before=before)
    name = ANSWERS if shard is None else f"run-{shard[0]}-of-{shard[1]}.json"
    text = json.dumps(made.to_json(), indent=1, ensure_ascii=False)
    try:
        staging.write(plan.out / name, text.encode("utf-8") + b"\n")
    except OutputError:
        if not made.failed:  # else a full disk has failed tasks, and those are to be named
            raise
    return made


def _longest_way_first(tasks: Sequence[Task]) -> list[Task]:
    """Order tasks by how many others wait for them, directly or not; equal ones as they are.

    So the one export that all fine-tunes of a base share begins at once, wherever its target stands
    in the fleet's file, and what needs nothing fills the time until it is done.
    """
    after: dict[str, set[str]] = {task.id: set() for task in tasks}
    for task in reversed(tasks):  # a plan has each task behind those that it needs
        for need in after.keys() & set(task.needs):
            after[need] |= {task.id, *after[task.id]}
    return sorted(tasks, key=lambda task: -len(after[task.id]))


def _run_all(
    todo: Sequence[Task],
    done: set[str],
    workers: int,
    children: Children,
    progress: Progress,
) -> tuple[dict[str, Mapping[str, Any]], dict[str, str]]:
    """Feed tasks to threads as soon as what they need is done, those first that others need."""
    answers: dict[str, Mapping[str, Any]] = {}
    skipped: dict[str, str] = {}
    waiting = _longest_way_first(todo)
    running: dict[Future[Mapping[str, Any]], Task] = {}
    lost: dict[str, str] = {}
    stop = threading.Event()
    at_once = 2 * workers  # half of them compute, the others put their results on the disk
    with ThreadPoolExecutor(at_once) as pool:
        try:
            while waiting or running:
                for task in list(waiting):
                    if len(running) == at_once:
                        break
                    if any(need in lost for need in task.needs):
                        waiting.remove(task)
                        cause = next(lost[need] for need in task.needs if need in lost)
                        skipped[task.name] = lost[task.id] = cause
                    elif done.issuperset(task.needs):
                        waiting.remove(task)
                        future = pool.submit(children.do, task, stop)
                        running[future] = task
                if not running:
                    continue
                ended, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    task, answer = running.pop(future), future.result()
                    answers[task.id] = answer
                    if answer["status"] == "done":
                        done.add(task.id)
                    else:
                        lost[task.id] = task.name
                    count = len(answers) + len(skipped)
                    progress(Event(stage="fleet", done=count, total=len(todo), unit="tasks"))
        finally:
            stop.set()
    return answers, skipped
