"""Run a plan on this machine: a pool of threads, each waiting for one child process at a time.

Children are forked from one server process that has loaded what most of them need, so a task of
milliseconds does not wait seconds for libraries. A killed child costs its own task, unlike a
process pool's worker, which takes all tasks of the pool with it.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kilodelta import memory
from kilodelta.errors import InputError
from kilodelta.files import staging
from kilodelta.fleet import child
from kilodelta.fleet.gpus import VISIBLE, gpus_for
from kilodelta.fleet.graph import Plan
from kilodelta.fleet.task import LIBRARIES, Task, memory_of
from kilodelta.fleet.work import preload
from kilodelta.progress import Event, Progress, silent

ANSWERS = "run.json"
RETRIES = 1
"""How often a task whose process was killed is tried again; an error is never tried again."""
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
        raise InputError(f"there is no shard {k} of {n}", fix="write --shard 1/8 to --shard 8/8")
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
    plan.out.mkdir(parents=True, exist_ok=True)
    staging.sweep(plan.out)
    workers = choose_jobs(todo, jobs)
    with _starting(todo, workers) as starts:
        answers, skipped = _run_all(todo, done, plan.out, workers, starts, progress)
    ordered = {t.id: answers[t.id] for t in todo if t.id in answers}
    made = FleetRun(out=plan.out, answers=ordered, skipped=skipped, done_before=before)
    name = ANSWERS if shard is None else f"run-{shard[0]}-of-{shard[1]}.json"
    text = json.dumps(made.to_json(), indent=1, ensure_ascii=False)
    staging.write(plan.out / name, text.encode("utf-8") + b"\n")
    return made


@dataclass(frozen=True, kw_only=True)
class Starts:
    """How children are started: forked from a process that has loaded what they need, or anew.

    Attributes:
        forking, anew: contexts of `multiprocessing`.
        alone: kinds of tasks that are started anew.
        gpus: what each running child may see, one for each task at once; empty without GPUs.
    """

    forking: Any
    anew: Any
    alone: frozenset[str]
    gpus: queue.SimpleQueue[str]

    def of(self, task: Task) -> Any:
        """Return the context that starts a task."""
        return self.anew if task.kind in self.alone else self.forking


def kinds_alone(tasks: Sequence[Task], workers: int) -> frozenset[str]:
    """Return the kinds whose libraries are not worth loading for all children.

    A process that holds torch takes several times as long to fork. Where few tasks need it, such
    as the one export that all fine-tunes share, they load it themselves while others work.

    Args:
        tasks: to run.
        workers: tasks at once.
    """
    heavy = [task.kind for task in tasks if task.kind in LIBRARIES]
    return frozenset(heavy) if len(heavy) <= workers < len(tasks) else frozenset()


@contextlib.contextmanager
def _starting(tasks: Sequence[Task], workers: int) -> Iterator[Starts]:
    """Start the process that children are forked from, with its threads fixed from the start."""
    cores = os.cpu_count() or 1
    threads = child.thread_environment(max(1, cores // workers))
    before = {name: os.environ.get(name) for name in threads}
    os.environ.update(threads)
    try:
        forking: Any = multiprocessing.get_context("forkserver")
        alone = kinds_alone(tasks, workers)
        kinds = {task.kind for task in tasks} - alone
        # A child runs the parent's script again, which imports the first one, and finds its
        # function in the second; the last one keeps what all have loaded where children share it.
        loaded = ["kilodelta.cli", __name__, *preload(kinds), "kilodelta.fleet.warm"]
        forking.set_forkserver_preload(loaded)
        gpus, found = queue.SimpleQueue[str](), gpus_for(tasks)
        for number in range(workers if found else 0):
            gpus.put(found[number % len(found)])
        anew = multiprocessing.get_context("spawn")
        yield Starts(forking=forking, anew=anew, alone=alone, gpus=gpus)
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _run_all(
    todo: Sequence[Task],
    done: set[str],
    out: Path,
    workers: int,
    starts: Starts,
    progress: Progress,
) -> tuple[dict[str, Mapping[str, Any]], dict[str, str]]:
    """Feed tasks to threads as soon as what they need is done."""
    answers: dict[str, Mapping[str, Any]] = {}
    skipped: dict[str, str] = {}
    waiting = list(todo)
    running: dict[Future[Mapping[str, Any]], Task] = {}
    lost: dict[str, str] = {}
    stop = threading.Event()
    with ThreadPoolExecutor(workers) as pool:
        try:
            while waiting or running:
                for task in list(waiting):
                    if any(need in lost for need in task.needs):
                        waiting.remove(task)
                        cause = next(lost[need] for need in task.needs if need in lost)
                        skipped[task.name] = lost[task.id] = cause
                    elif len(running) < workers and done.issuperset(task.needs):
                        waiting.remove(task)
                        future = pool.submit(_attended, task, out, starts, stop)
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


def _attended(task: Task, out: Path, starts: Starts, stop: threading.Event) -> Mapping[str, Any]:
    """Run a task in a child that sees one GPU at most; a killed child is tried again."""
    gpu = None if starts.gpus.empty() else starts.gpus.get()
    try:
        return _tried(task, out, starts.of(task), stop, gpu)
    finally:
        if gpu is not None:
            starts.gpus.put(gpu)


def _tried(
    task: Task, out: Path, context: Any, stop: threading.Event, gpu: str | None
) -> Mapping[str, Any]:
    given = {**task.to_json(), "gpu": gpu}
    for attempt in range(RETRIES + 1):
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(given, str(out), sending))
        process.start()
        sending.close()
        answer: Mapping[str, Any] | None = None
        while not stop.is_set():
            if receiving.poll(0.05):
                with contextlib.suppress(EOFError, ConnectionError):
                    answer = receiving.recv()
                break
        else:
            process.terminate()
        process.join()
        receiving.close()
        if answer is not None:
            return answer
        code = process.exitcode or 0
        if attempt == RETRIES or stop.is_set():
            return _killed(task, code)
    raise AssertionError("unreachable")


def _killed(task: Task, code: int) -> dict[str, Any]:
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return {
        "id": task.id,
        "name": task.name,
        "status": "failed",
        "error": f"its process ended by {how} without an answer",
        "fix": "give it more memory (--jobs 1), then run the fleet again",
        "exit_code": 1,
        "seconds": 0.0,
    }


def _child(task: Mapping[str, Any], out: str, answers: Any) -> None:
    """Run in the child; Ctrl-C reaches it by its parent alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if task.get("gpu") is not None:  # before the first call of CUDA, which reads it
        os.environ[VISIBLE] = task["gpu"]
    # Libraries' talk would break into the parent's progress.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    answers.send(child.do(task, Path(out)))
    answers.close()
